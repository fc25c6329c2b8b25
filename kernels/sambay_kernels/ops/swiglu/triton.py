"""SwiGLU by Triton kernels: any shape as rows, launches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...triton.launch import channel_block, launch
from .rows import as_rows

BLOCK = 1024  # elements of a program: 16 bytes of bfloat16 for each lane of four warps


def swiglu_triton(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous."""
    from .triton_kernels import swiglu_forward_kernel

    out = gate.new_empty(gate.shape)
    if out.numel():
        _launch(swiglu_forward_kernel, *as_rows(gate, value, out))
    return out


def swiglu_triton_backward(grad: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """Write the gradients of gate and value."""
    from .triton_kernels import swiglu_backward_kernel

    if gate.numel():
        _launch(swiglu_backward_kernel, *as_rows(grad, gate, value, of_gate, of_value))


def _launch(kernel: Any, *tensors: Tensor) -> None:
    (count, width), strides = tensors[0].shape, (value.stride(0) for value in tensors)
    block = channel_block(width, BLOCK)
    launch(kernel, (count * -(-width // block),), *tensors, width, *strides, BLOCK=block)
