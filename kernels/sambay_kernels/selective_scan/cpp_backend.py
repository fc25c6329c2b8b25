"""Selective scan by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import compute_dtype
from ..cpp_call import (
    ScanArgs,
    ScanBackward,
    ScanForward,
    borders_of,
    call,
    groups_of,
    lanes,
    packed,
    pointer,
    rows,
    rows_of,
)

SCAN_KEPT_EVERY = 32  # tokens between two kept states; kChunk in csrc/cpu.cpp


class _Inputs:
    """The inputs in the form C++ reads, kept alive while it does."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        self.dtype = dtype = compute_dtype(u)
        self.borders = borders_of(cu_seqlens, u.shape[0])
        self.documents = self.borders.numel() - 1
        self.tensors = [rows(value, dtype) for value in (u, delta, B, C, z)]
        self.tensors += [packed(value, dtype) for value in (A, D, delta_bias, initial_state)]
        matrices = [rows_of(value) for value in self.tensors[:5]]
        vectors = [pointer(value) for value in self.tensors[5:]]
        sizes = (*u.shape, A.shape[1], self.documents)
        self.args = ScanArgs(*sizes, pointer(self.borders), *matrices, *vectors, int(delta_softplus))


def selective_scan_cpp(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    *,
    kept_shape: tuple[int, int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """y, final_state and the states kept for the backward, (rows, N, d_inner); with 0 rows none is."""
    inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    y = u.new_empty(u.shape, dtype=inputs.dtype)
    final = u.new_empty(inputs.documents, *A.shape, dtype=inputs.dtype)
    # Zeros, because short documents leave rows unused and an op's output should be the same in every run.
    kept = u.new_zeros(kept_shape, dtype=inputs.dtype)
    outputs = (pointer(y), pointer(final), pointer(kept) if kept_shape[0] else None)
    call("scan_forward", inputs.dtype, ScanForward(inputs.args, *outputs))
    return y.to(u.dtype), final, kept


def selective_scan_step_cpp(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    slots: Tensor | None,
) -> Tensor:
    """One token of each sequence: a document of one token, whose state (of the compute type) changes in place."""
    held = state if slots is None else state[slots]
    borders = torch.arange(u.shape[0] + 1, dtype=torch.int32)
    inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, borders, held)
    y = u.new_empty(u.shape, dtype=inputs.dtype)
    # C++ reads a document's states of a block of channels before it writes them: they may be written where they were.
    call("scan_forward", inputs.dtype, ScanForward(inputs.args, pointer(y), pointer(held), None))
    if slots is None:
        torch.autograd.graph.increment_version(state)  # as an operation of torch would, so that autograd notices
    else:
        state[slots] = held
    return y.to(u.dtype)


def selective_scan_cpp_backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    *,
    kept: Tensor,
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state in the compute type; None for None."""
    inputs = _Inputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    (total, channels), states = u.shape, A.shape[1]
    groups, blocks = groups_of(inputs.borders), (channels + lanes() - 1) // lanes()

    def empty(wanted: Tensor | None, *shape: int) -> Tensor | None:
        return None if wanted is None else u.new_empty(shape, dtype=inputs.dtype)

    tokens = [empty(value, total, channels) for value in (u, delta, z)]
    partial = [empty(A, groups, channels, states), empty(D, groups, channels), empty(delta_bias, groups, channels)]
    maps = [empty(value, blocks, total, states) for value in (B, C)]
    initial = empty(initial_state, inputs.documents, channels, states)
    given = (rows(grad_y, inputs.dtype), packed(grad_final, inputs.dtype))
    outputs = [pointer(value) for value in (*tokens, *partial, *maps, initial)]
    args = ScanBackward(inputs.args, rows_of(given[0]), pointer(given[1]), pointer(kept), *outputs)
    call("scan_backward", inputs.dtype, args)
    sums = [None if value is None else _sum_in_order(value) for value in (*partial, *maps)]
    return [tokens[0], tokens[1], sums[0], sums[3], sums[4], sums[1], tokens[2], sums[2], initial]


def _sum_in_order(partial: Tensor) -> Tensor:
    """Sum over the first dimension, one term after another: the bits then don't depend on the other dimensions."""
    total = partial.new_zeros(partial.shape[1:]) if partial.shape[0] == 0 else partial[0]
    for part in partial[1:]:
        total = torch.add(total, part)
    return total
