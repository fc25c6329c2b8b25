"""Calling the C++ backend: its structures, as in csrc/cpu.cpp."""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from .cpp_build import library
from .tensors import Heads, Rows

SUFFIXES = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16"}


class ScanArgs(Structure):
    """Inputs of the selective scan."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "channels", "states", "documents")),
        ("borders", c_void_p),
        *((name, Rows) for name in ("u", "delta", "B", "C", "z")),
        *((name, c_void_p) for name in ("A", "D", "bias", "initial")),
        ("softplus", c_int64),
    )


class ScanForward(Structure):
    """Inputs and outputs of the scan's forward pass."""

    _fields_ = (("inputs", ScanArgs), *((name, c_void_p) for name in ("y", "final_state", "checkpoints")))


class ScanBackward(Structure):
    """Inputs and outputs of the scan's backward pass."""

    _fields_ = (
        ("inputs", ScanArgs),
        ("grad_y", Rows),
        *((name, c_void_p) for name in ("grad_final", "checkpoints")),
        *((name, c_void_p) for name in ("u", "delta", "z", "A", "D", "bias", "B", "C", "initial")),
    )


class ConvArgs(Structure):
    """Inputs of the causal convolution."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "channels", "width", "documents")),
        ("borders", c_void_p),
        ("x", Rows),
        *((name, c_void_p) for name in ("weight", "bias", "initial")),
        ("silu", c_int64),
    )


class ConvForward(Structure):
    """Inputs and outputs of the convolution's forward pass."""

    _fields_ = (("inputs", ConvArgs), *((name, c_void_p) for name in ("y", "final_state")))


class ConvBackward(Structure):
    """Inputs and outputs of the convolution's backward pass."""

    _fields_ = (
        ("inputs", ConvArgs),
        ("grad_y", Rows),
        ("grad_final", c_void_p),
        *((name, c_void_p) for name in ("x", "weight", "bias", "initial")),
    )


class AttentionArgs(Structure):
    """Inputs of differential attention."""

    _fields_ = (
        *((name, c_int64) for name in ("documents", "heads", "key_heads", "width")),
        *((name, c_void_p) for name in ("borders_q", "borders_k")),
        ("window", c_int64),
        *((name, c_double) for name in ("scale", "lambda_init", "eps")),
        *((name, Heads) for name in ("q", "k", "v")),
        *((name, c_void_p) for name in ("lambda_full", "weight")),
    )


class AttentionForward(Structure):
    """Inputs and outputs of attention's forward pass."""

    _fields_ = (("inputs", AttentionArgs), *((name, c_void_p) for name in ("out", "mixed", "softmax")))


class AttentionBackward(Structure):
    """Inputs and outputs of attention's backward pass."""

    _fields_ = (
        ("inputs", AttentionArgs),
        *((name, c_void_p) for name in ("grad", "mixed", "softmax", "q", "k", "v", "lambda_full", "weight")),
    )


class AttentionStep(Structure):
    """Inputs and output of attention of one new token of each sequence."""

    _fields_ = (
        ("inputs", AttentionArgs),
        ("keys", c_int64),
        ("row_keys", c_int64),
        ("mask", c_void_p),
        ("mask_row", c_int64),
        ("out", c_void_p),
    )


class AddLayerNormForward(Structure):
    """Inputs and outputs of the residual addition and LayerNorm."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "width", "narrow_delta", "narrow_normed")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("hidden", "delta", "weight", "bias", "total", "normed", "stats")),
    )


class AddLayerNormBackward(Structure):
    """Inputs and outputs of their backward pass."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "width", "narrow_delta", "narrow_normed")),
        *((name, c_void_p) for name in ("grad", "grad_total", "total", "stats", "weight")),
        *((name, c_void_p) for name in ("of_total", "of_delta", "of_weight", "of_bias")),
    )


def borders_of(cu_seqlens: Tensor | None, total: int) -> Tensor:
    """Document borders as contiguous int32."""
    if cu_seqlens is None:
        return torch.tensor([0, total], dtype=torch.int32)
    return cu_seqlens.contiguous()


def groups_of(borders: Tensor) -> int:
    """Number of document groups, which is the number of partial sums of a weight's gradient."""
    count = library().sambay_groups
    count.restype, count.argtypes = c_int64, (c_void_p, c_int64)
    return count(borders.data_ptr(), borders.numel() - 1)


def lanes() -> int:
    """Channels of one task: every such block has its own partial gradient of B and C."""
    size = library().sambay_lanes
    size.restype = c_int64
    return size()


@functools.cache
def _function(name: str, dtype: torch.dtype, structure: type[Structure]) -> Callable[[Any, int], None]:
    found = getattr(library(), f"sambay_{name}_{SUFFIXES[dtype]}")
    found.restype, found.argtypes = None, (POINTER(structure), c_int)
    return found


def call(name: str, dtype: torch.dtype, args: Structure) -> None:
    """Call a function of one structure, for tokens stored in this type, on torch's number of threads."""
    _function(name, dtype, type(args))(byref(args), torch.get_num_threads())
