"""SwiGLU by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_call import call_elementwise
from ...runtime.checks import compute_dtype


def swiglu_cpp(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous."""
    dtype = compute_dtype(gate)
    inputs = [x.to(dtype).contiguous() for x in (gate, value)]
    y = gate.new_empty(gate.shape, dtype=dtype)
    call_elementwise("swiglu_forward", dtype, (*inputs, y))
    return y.to(gate.dtype)


def swiglu_cpp_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and value in the compute type."""
    dtype = compute_dtype(gate)
    inputs = [x.to(dtype).contiguous() for x in (grad, gate, value)]
    grads = (torch.empty_like(inputs[1]), torch.empty_like(inputs[2]))
    call_elementwise("swiglu_backward", dtype, (*inputs, *grads))
    return grads
