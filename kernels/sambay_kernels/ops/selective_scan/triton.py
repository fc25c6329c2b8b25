"""Selective scan by Triton kernels: plan, buffers, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.segments import Segments, power_of_two, segment_length, segments
from ...triton.launch import INTERPRETED, channel_block, launch, rows
from .inputs import ScanInputs

TRITON_KEPT_EVERY = 8  # tokens between two kept states: 1.3 GB for 32,768 tokens of 5,120 channels
GROUP = 4  # tokens whose states the backward holds in registers (8 would spill); divides TRITON_KEPT_EVERY
BLOCK = 32  # channels of a program: one lane each


class _Plan:
    """What all launches of a call share."""

    def __init__(self, inputs: ScanInputs) -> None:
        u = inputs.u
        (self.total, self.channels), self.states = u.shape, inputs.A.shape[1]
        self.block = BLOCK if not INTERPRETED else channel_block(self.channels, BLOCK)
        length = segment_length(self.total, self.channels, self.block)
        self.cut: Segments = segments(inputs.cu_seqlens, self.total, length, u.device)
        self.tiles = -(-self.channels // self.block)
        self.count, self.documents = self.cut.start.shape[0], self.cut.borders.shape[0] - 1
        self.several = self.total > length  # otherwise no document can be cut
        self.options: dict[str, Any] = {
            "STATES": self.states, "PADDED": power_of_two(self.states), "BLOCK": self.block, "warps": 1,
        }  # fmt: skip
        self.softplus = {"SOFTPLUS": inputs.delta_softplus}
        self.spans = (self.cut.start, self.cut.end, self.cut.document, self.cut.borders)

    def segment_states(self, like: Tensor) -> Tensor:
        """(n, N, d_inner) float32."""
        return like.new_empty((self.count, self.states, self.channels), dtype=torch.float32)

    def segment_sums(self, like: Tensor) -> Tensor:
        """(n, d_inner) float32."""
        return like.new_empty((self.count, self.channels), dtype=torch.float32)

    def run(self, kernel: Any, by: int, *args: Any, **constants: Any) -> None:
        """Launch for every tile of channels and `by` segments or documents."""
        launch(kernel, (self.tiles, by), *args, **self.options, **constants)


def laid_out(inputs: ScanInputs) -> ScanInputs:
    """The inputs as the kernels read them: contiguous, but for rows of tokens, which may stand apart."""
    u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial_state = inputs
    u, delta, B, C = rows(u), rows(delta), rows(B), rows(C)
    z = None if z is None else rows(z)
    D, delta_bias, initial_state = (None if x is None else x.contiguous() for x in (D, delta_bias, initial_state))
    return ScanInputs(u, delta, A.contiguous(), B, C, D, z, delta_bias, softplus, cu_seqlens, initial_state)


def selective_scan_triton(inputs: ScanInputs, kept_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, final_state and the states kept for the backward, (rows, N, d_inner); with 0 rows none is."""
    from . import triton_kernels as kernels

    plan = _Plan(inputs)
    u, delta, A, B, C, D, z, delta_bias, _, _, initial_state = laid_out(inputs)
    y = u.new_empty(u.shape)
    final = u.new_empty((plan.documents, *A.shape), dtype=torch.float32)
    # Zeros, because short documents leave rows unused and an op's output should be the same in every run.
    kept = u.new_zeros(kept_shape, dtype=torch.float32)
    strides = (plan.channels, u.stride(0), delta.stride(0), B.stride(0))
    carried = None
    if plan.several:
        local, elapsed, carried = plan.segment_states(u), plan.segment_sums(u), plan.segment_states(u)
        plan.run(
            kernels.scan_local_kernel, plan.count, u, delta, A, B, delta_bias, *plan.spans, local, elapsed, *strides,
            **plan.softplus,
        )  # fmt: skip
        plan.run(
            kernels.scan_carry_kernel, plan.documents, A, initial_state, plan.cut.first, local, elapsed, carried,
            plan.channels,
        )  # fmt: skip
    plan.run(
        kernels.scan_forward_kernel, plan.count, u, delta, A, B, C, D, z, delta_bias, initial_state, carried,
        *plan.spans, y, final, kept if kept_shape[0] else None, *strides, C.stride(0), 0 if z is None else z.stride(0),
        KEEP=TRITON_KEPT_EVERY, **plan.softplus,
    )  # fmt: skip
    return y, final, kept


def selective_scan_triton_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ScanInputs, kept: Tensor
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state; None for None."""
    from . import triton_kernels as kernels

    plan = _Plan(inputs)
    u, delta, A, B, C, D, z, delta_bias, _, _, initial_state = laid_out(inputs)
    grad_y = None if grad_y is None else rows(grad_y)
    grad_final = None if grad_final is None else grad_final.contiguous()
    grad_row, z_row = (0 if x is None else x.stride(0) for x in (grad_y, z))
    carried = None
    if plan.several:
        local, elapsed, carried = plan.segment_states(u), plan.segment_sums(u), plan.segment_states(u)
        # Without a gradient of y the only one comes from the final state: one segment after another, nothing local.
        upstream = u.new_zeros((1, plan.channels)).expand(u.shape) if grad_y is None else grad_y
        plan.run(
            kernels.scan_local_backward_kernel, plan.count, upstream, delta, A, C, z, delta_bias, *plan.spans, local,
            elapsed, plan.channels, upstream.stride(0), delta.stride(0), C.stride(0), z_row, **plan.softplus,
        )  # fmt: skip
        plan.run(
            kernels.scan_carry_backward_kernel, plan.documents, A, grad_final, plan.cut.first, local, elapsed, carried,
            plan.channels,
        )  # fmt: skip
    tokens = [None if x is None else x.new_empty(x.shape) for x in (u, delta, z)]
    sum_A = plan.segment_states(u)
    sum_D, sum_bias = (None if x is None else plan.segment_sums(u) for x in (D, delta_bias))
    sum_B, sum_C = (u.new_empty((plan.tiles, plan.total, plan.states), dtype=torch.float32) for _ in "BC")
    grad_initial = None if initial_state is None else u.new_empty(initial_state.shape, dtype=torch.float32)
    plan.run(
        kernels.scan_backward_kernel, plan.count, grad_y, grad_final, u, delta, A, B, C, D, z, delta_bias, carried,
        kept, *plan.spans, *tokens, sum_A, sum_B, sum_C, sum_D, sum_bias, grad_initial, plan.total, plan.channels,
        grad_row, u.stride(0), delta.stride(0), B.stride(0), C.stride(0), z_row,
        KEEP=TRITON_KEPT_EVERY, GROUP=GROUP, **plan.softplus,
    )  # fmt: skip
    grad_A = sum_A.sum(0).t()
    grad_D, grad_bias = (None if x is None else x.sum(0) for x in (sum_D, sum_bias))
    return [tokens[0], tokens[1], grad_A, sum_B.sum(0), sum_C.sum(0), grad_D, tokens[2], grad_bias, grad_initial]
