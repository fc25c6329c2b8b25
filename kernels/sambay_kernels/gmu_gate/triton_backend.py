"""The gate by Triton kernels: any shape as rows, launches."""

from __future__ import annotations

from torch import Tensor

from ..triton_call import channel_block, launch, rows

BLOCK = 1024  # elements of a program: 16 bytes of bfloat16 for each lane of four warps


def _as_rows(value: Tensor) -> Tensor:
    """(rows, width) with contiguous rows; a copy only where the strides allow no view."""
    return rows(value.reshape(-1, value.shape[-1] if value.dim() else 1))


def gmu_gate_triton(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory, contiguous."""
    from .triton_kernels import gate_forward_kernel

    out = gate.new_empty(gate.shape)
    if out.numel():
        g, m = _as_rows(gate), _as_rows(memory)
        (count, width), block = g.shape, channel_block(g.shape[1], BLOCK)
        grid = (count, -(-width // block))
        launch(gate_forward_kernel, grid, g, m, out, width, g.stride(0), m.stride(0), BLOCK=block)
    return out


def gmu_gate_triton_backward(grad: Tensor, gate: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and memory, each in its input's type."""
    from .triton_kernels import gate_backward_kernel

    grad_gate, grad_memory = gate.new_empty(gate.shape), memory.new_empty(memory.shape)
    if gate.numel():
        up, g, m = (_as_rows(value) for value in (grad, gate, memory))
        (count, width), block = g.shape, channel_block(g.shape[1], BLOCK)
        grid = (count, -(-width // block))
        launch(
            gate_backward_kernel, grid, up, g, m, grad_gate, grad_memory, width, up.stride(0), g.stride(0), m.stride(0),
            BLOCK=block,
        )  # fmt: skip
    return grad_gate, grad_memory
