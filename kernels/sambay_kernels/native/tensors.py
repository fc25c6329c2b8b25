"""How tensors enter the structures of C++ and CUDA C++: pointers and strides, and the structures that both have."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_void_p

import torch
from torch import Tensor


class Rows(Structure):
    """A (tokens, width) matrix whose rows stand `stride` elements apart."""

    _fields_ = (("data", c_void_p), ("stride", c_int64))


class Heads(Structure):
    """A (tokens, heads, width) tensor whose tokens and heads stand `token` and `head` elements apart."""

    _fields_ = (("data", c_void_p), ("token", c_int64), ("head", c_int64))


class SwigluForward(Structure):
    """Inputs and output of the gate's forward pass."""

    _fields_ = (("count", c_int64), ("width", c_int64), ("gate", Rows), ("value", Rows), ("out", c_void_p))


class SwigluBackward(Structure):
    """Inputs and outputs of the gate's backward pass."""

    _fields_ = (
        ("count", c_int64),
        ("width", c_int64),
        *((name, Rows) for name in ("grad", "gate", "value", "of_gate", "of_value")),
    )


def rows(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A matrix as C++ reads it: of this type, elements of a row side by side, rows any distance apart."""
    if value is None:
        return None
    value = value.to(dtype)
    return value if value.stride(1) == 1 or value.shape[1] <= 1 else value.contiguous()


def packed(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A contiguous tensor of this type."""
    return None if value is None else value.to(dtype).contiguous()


def rows_of(value: Tensor | None) -> Rows:
    """Pointer and stride; the caller keeps the tensor alive."""
    return Rows(None, 0) if value is None else Rows(value.data_ptr(), value.stride(0))


def heads_of(value: Tensor) -> Heads:
    """Pointer and strides of a tensor whose heads hold their elements side by side; the caller keeps it alive."""
    return Heads(value.data_ptr(), value.stride(0), value.stride(1))


def pointer(value: Tensor | None) -> int | None:
    """Address; the caller keeps the tensor alive."""
    return None if value is None else value.data_ptr()
