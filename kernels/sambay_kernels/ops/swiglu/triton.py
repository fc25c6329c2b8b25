"""SwiGLU by Triton kernels: any shape as rows, launches."""

from __future__ import annotations

from torch import Tensor

from ...triton.launch import channel_block, launch, rows

BLOCK = 1024  # elements of a program: 16 bytes of bfloat16 for each lane of four warps


def _as_rows(value: Tensor) -> Tensor:
    """(rows, width) with contiguous rows; a copy only where the strides allow no view."""
    return rows(value.reshape(-1, value.shape[-1] if value.dim() else 1))


def swiglu_triton(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous."""
    from .triton_kernels import swiglu_forward_kernel

    out = gate.new_empty(gate.shape)
    if out.numel():
        g, m = _as_rows(gate), _as_rows(value)
        (count, width), block = g.shape, channel_block(g.shape[1], BLOCK)
        grid = (count, -(-width // block))
        launch(swiglu_forward_kernel, grid, g, m, out, width, g.stride(0), m.stride(0), BLOCK=block)
    return out


def swiglu_triton_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and value, each in its input's type."""
    from .triton_kernels import swiglu_backward_kernel

    grad_gate, grad_value = gate.new_empty(gate.shape), value.new_empty(value.shape)
    if gate.numel():
        up, g, m = (_as_rows(x) for x in (grad, gate, value))
        (count, width), block = g.shape, channel_block(g.shape[1], BLOCK)
        grid = (count, -(-width // block))
        launch(
            swiglu_backward_kernel, grid, up, g, m, grad_gate, grad_value, width, up.stride(0), g.stride(0),
            m.stride(0), BLOCK=block,
        )  # fmt: skip
    return grad_gate, grad_value
