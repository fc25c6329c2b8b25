"""SwiGLU by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_call import SwigluBackward, SwigluForward, call
from ...native.tensors import pointer, rows_of
from ...runtime.checks import compute_dtype
from .rows import as_rows


def swiglu_cpp(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous."""
    dtype = compute_dtype(gate)
    out = gate.new_empty(gate.shape, dtype=dtype)
    if out.numel():
        inputs = as_rows(gate.to(dtype), value.to(dtype))
        call("swiglu_forward", dtype, SwigluForward(*inputs[0].shape, *map(rows_of, inputs), pointer(out)))
    return out.to(gate.dtype)


def swiglu_cpp_backward(grad: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """Write the gradients of gate and value."""
    dtype = compute_dtype(gate)
    outputs = [out if out.dtype == dtype else torch.empty_like(out, dtype=dtype) for out in (of_gate, of_value)]
    if gate.numel():
        tensors = as_rows(*(x.to(dtype) for x in (grad, gate, value)), *outputs)
        call("swiglu_backward", dtype, SwigluBackward(*tensors[0].shape, *map(rows_of, tensors)))
    for out, made in zip((of_gate, of_value), outputs, strict=True):
        if made is not out:
            out.copy_(made)
