"""SwiGLU by the C++ extension."""

from __future__ import annotations

from torch import Tensor

from ...native.cpp_call import call
from ...native.tensors import SwigluBackward, SwigluForward, pointer, rows_of
from ...runtime.checks import stored_dtype
from .rows import as_rows, in_type


def swiglu_cpp(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous."""
    dtype = stored_dtype(gate, value)
    out = gate.new_empty(gate.shape, dtype=dtype)
    if out.numel():
        inputs = as_rows(gate.to(dtype), value.to(dtype))
        call("swiglu_forward", dtype, SwigluForward(*inputs[0].shape, *map(rows_of, inputs), pointer(out)))
    return out.to(gate.dtype)


def swiglu_cpp_backward(grad: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """Write the gradients of gate and value."""
    dtype = stored_dtype(gate, value, grad)
    with in_type((of_gate, of_value), dtype) as outputs:
        if gate.numel():
            tensors = as_rows(*(x.to(dtype) for x in (grad, gate, value)), *outputs)
            call("swiglu_backward", dtype, SwigluBackward(*tensors[0].shape, *map(rows_of, tensors)))
