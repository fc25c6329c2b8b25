"""Selective scan by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_call import ScanArgs, ScanBackward, ScanForward, borders_of, call, groups_of, lanes
from ...native.tensors import packed, pointer, rows, rows_of
from ...runtime.checks import compute_dtype, stored_dtype
from .inputs import ScanInputs

SCAN_KEPT_EVERY = 32  # tokens between two kept states; kChunk in csrc/cpu.cpp


class _Call:
    """The inputs in the form C++ reads, kept alive while it does."""

    def __init__(self, inputs: ScanInputs, grad_y: Tensor | None = None) -> None:
        u, delta, A, B, C, D, z, delta_bias, softplus, cu_seqlens, initial_state = inputs
        self.stored = stored_dtype(u, delta, B, C, z, grad_y)
        self.dtype = dtype = compute_dtype(u)
        self.borders = borders_of(cu_seqlens, u.shape[0])
        self.documents = self.borders.numel() - 1
        self.tensors = [rows(value, self.stored) for value in (u, delta, B, C, z)]
        self.tensors += [packed(value, dtype) for value in (A, D, delta_bias, initial_state)]
        matrices = [rows_of(value) for value in self.tensors[:5]]
        vectors = [pointer(value) for value in self.tensors[5:]]
        sizes = (*u.shape, A.shape[1], self.documents)
        self.args = ScanArgs(*sizes, pointer(self.borders), *matrices, *vectors, int(softplus))


def selective_scan_cpp(inputs: ScanInputs, kept_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """y, final_state and the states kept for the backward, (rows, N, d_inner); with 0 rows none is."""
    made, u = _Call(inputs), inputs.u
    y = u.new_empty(u.shape, dtype=made.stored)
    final = u.new_empty(made.documents, *inputs.A.shape, dtype=made.dtype)
    # Zeros, because short documents leave rows unused and an op's output should be the same in every run.
    kept = u.new_zeros(kept_shape, dtype=made.dtype)
    outputs = (pointer(y), pointer(final), pointer(kept) if kept_shape[0] else None)
    call("scan_forward", made.stored, ScanForward(made.args, *outputs))
    return y.to(u.dtype), final, kept


def selective_scan_step_cpp(state: Tensor, inputs: ScanInputs, slots: Tensor | None) -> Tensor:
    """One token of each sequence: a document of one token, whose state (of the compute type) changes in place."""
    held, u = state if slots is None else state[slots], inputs.u
    borders = torch.arange(u.shape[0] + 1, dtype=torch.int32)
    made = _Call(inputs._replace(cu_seqlens=borders, initial_state=held))
    y = u.new_empty(u.shape, dtype=made.stored)
    # C++ reads a document's states of a block of channels before it writes them: they may be written where they were.
    call("scan_forward", made.stored, ScanForward(made.args, pointer(y), pointer(held), None))
    if slots is None:
        torch.autograd.graph.increment_version(state)  # as an operation of torch would, so that autograd notices
    else:
        state[slots] = held
    return y.to(u.dtype)


def selective_scan_cpp_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ScanInputs, kept: Tensor
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, summed in the compute type; None for None."""
    made, u, A, B, C = _Call(inputs, grad_y), inputs.u, inputs.A, inputs.B, inputs.C
    (total, channels), states = u.shape, A.shape[1]
    groups, blocks = groups_of(made.borders), (channels + lanes() - 1) // lanes()

    def empty(wanted: Tensor | None, *shape: int, dtype: torch.dtype = made.dtype) -> Tensor | None:
        return None if wanted is None else u.new_empty(shape, dtype=dtype)

    tokens = [empty(value, total, channels, dtype=made.stored) for value in (u, inputs.delta, inputs.z)]
    vectors = [empty(value, groups, channels) for value in (inputs.D, inputs.delta_bias)]
    partial = [empty(A, groups, channels, states), *vectors]
    maps = [empty(value, blocks, total, states) for value in (B, C)]
    initial = empty(inputs.initial_state, made.documents, channels, states)
    given = (rows(grad_y, made.stored), packed(grad_final, made.dtype))
    outputs = [pointer(value) for value in (*tokens, *partial, *maps, initial)]
    args = ScanBackward(made.args, rows_of(given[0]), pointer(given[1]), pointer(kept), *outputs)
    call("scan_backward", made.stored, args)
    sums = [None if value is None else _sum_in_order(value) for value in (*partial, *maps)]
    return [tokens[0], tokens[1], sums[0], sums[3], sums[4], sums[1], tokens[2], sums[2], initial]


def _sum_in_order(partial: Tensor) -> Tensor:
    """Sum over the first dimension, one term after another: the bits then don't depend on the other dimensions."""
    total = partial.new_zeros(partial.shape[1:]) if partial.shape[0] == 0 else partial[0]
    for part in partial[1:]:
        total = torch.add(total, part)
    return total
