"""The gate by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..cpp_call import call_elementwise


def gmu_gate_cpp(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory, contiguous."""
    dtype = compute_dtype(gate)
    inputs = [value.to(dtype).contiguous() for value in (gate, memory)]
    y = gate.new_empty(gate.shape, dtype=dtype)
    call_elementwise("gate_forward", dtype, (*inputs, y))
    return y.to(gate.dtype)


def gmu_gate_cpp_backward(grad: Tensor, gate: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and memory in the compute type."""
    dtype = compute_dtype(gate)
    inputs = [value.to(dtype).contiguous() for value in (grad, gate, memory)]
    grads = (torch.empty_like(inputs[1]), torch.empty_like(inputs[2]))
    call_elementwise("gate_backward", dtype, (*inputs, *grads))
    return grads
