"""Selective scan in plain torch, in two levels: chunks side by side, then the carry from chunk to chunk.

The file imports torch and `inputs` alone and keeps its names to itself, so that it can travel inside an exported model.

Every document is cut into chunks of SCAN_CHUNK tokens of its own, so no chunk holds two documents: nothing has to be
reset, a NaN stays in its document, and a document's result does not depend on its neighbours. The chunks are laid out
rank by rank (all first chunks, then all second ones, ...) with the longest document first; the carry loop then runs
over ranks, for all documents at once, on a prefix that shrinks as documents end.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import ScanInputs

SCAN_CHUNK = 32
# State values (tokens x states x channels) worked on at a time; channels are independent, so wide rows go in slices.
SCAN_BLOCK_ELEMENTS = 1 << 23


class _ScanPlan(NamedTuple):
    """Where the tokens of a packed row stand in the (steps, chunks) grid.

    position: (T,) flat place step * chunks + chunk of each token.
    ranks: chunks of each rank, non-increasing; they sum to `chunks`.
    order: (ranks[0],) documents with at least one token, longest first.
    last: (ranks[0],) the last chunk of each of these documents.
    """

    steps: int
    chunks: int
    documents: int
    ranks: list[int]
    position: Tensor
    order: Tensor
    last: Tensor


def _scan_plan(cu_seqlens: Tensor | None, total: int, device: torch.device) -> _ScanPlan:
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, total])
    borders = cu_seqlens.to("cpu", torch.int64)
    lengths = borders.diff()
    counts = (lengths + SCAN_CHUNK - 1) // SCAN_CHUNK
    order = torch.argsort(counts, descending=True, stable=True)
    # ranks[k] = documents with more than k chunks.
    per_count = torch.bincount(counts) if counts.numel() else torch.zeros(1, dtype=torch.int64)
    ranks = (lengths.numel() - per_count.cumsum(0))[:-1]
    offsets = ranks.cumsum(0) - ranks
    chunks = int(ranks.sum())
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    document = torch.repeat_interleave(torch.arange(lengths.numel()), lengths)
    within = torch.arange(total) - borders[:-1][document]
    chunk = offsets[within // SCAN_CHUNK] + place[document]
    order = order[: int(ranks[0]) if ranks.numel() else 0]
    return _ScanPlan(
        steps=min(SCAN_CHUNK, int(lengths.max()) if lengths.numel() else 0),
        chunks=chunks,
        documents=lengths.numel(),
        ranks=ranks.tolist(),
        position=(within % SCAN_CHUNK * chunks + chunk).to(device),
        order=order.to(device),
        last=(offsets[counts[order] - 1] + place[order]).to(device),
    )


def _scan_to_grid(rows: Tensor, plan: _ScanPlan) -> tuple[Tensor, ...]:
    """(T, width) -> `steps` tensors (chunks, width); the places after a document's end are zero."""
    grid = rows.new_zeros(plan.steps * plan.chunks, rows.shape[1]).index_copy(0, plan.position, rows)
    return grid.view(plan.steps, plan.chunks, rows.shape[1]).unbind(0)


def _scan_from_grid(grid: Tensor, plan: _ScanPlan) -> Tensor:
    """(steps, chunks, width) -> (T, width)."""
    return grid.reshape(plan.steps * plan.chunks, grid.shape[2]).index_select(0, plan.position)


def _scan_chunk_starts(
    decays: list[Tensor], drives: list[Tensor], dts: tuple[Tensor, ...], A: Tensor, first: Tensor, plan: _ScanPlan
) -> Tensor:
    """State (chunks, N, width) at the start of each chunk, given the documents' first states (ranks[0], N, width)."""
    if len(plan.ranks) == 1:
        return first
    end = drives[0]
    for decay, drive in zip(decays[1:], drives[1:], strict=True):
        end = torch.addcmul(drive, decay, end)
    # The product of the decays, without the product: exp(A dt_1) exp(A dt_2) ... = exp(A sum dt).
    through = torch.exp(torch.stack(dts).sum(0).unsqueeze(1) * A)
    starts = [first]
    ends, throughs = end.split(plan.ranks), through.split(plan.ranks)
    for rank, size in enumerate(plan.ranks[1:]):
        starts.append(torch.addcmul(ends[rank][:size], throughs[rank][:size], starts[-1][:size]))
    return torch.cat(starts)


def _scan_channels(
    dt: Tensor, x: Tensor, A: Tensor, B: Tensor, C: Tensor, initial: Tensor | None, plan: _ScanPlan
) -> tuple[Tensor, Tensor]:
    """Scan a slice of channels. dt, x (T, w); A (N, w); B, C (T, N); initial (S, N, w) -> y (T, w), final (S, N, w)."""
    shape = (A.shape[0], A.shape[1])
    if initial is None:
        initial = dt.new_zeros(plan.documents, *shape)
    if plan.chunks == 0:
        return dt * x, initial
    # States stand before channels: the innermost loop then runs over many channels, not over 16 states.
    dts, inputs = _scan_to_grid(dt, plan), _scan_to_grid(dt * x, plan)
    decays = [torch.exp(step.unsqueeze(1) * A) for step in dts]
    drives = [v.unsqueeze(1) * b.unsqueeze(2) for v, b in zip(inputs, _scan_to_grid(B, plan), strict=True)]
    h = _scan_chunk_starts(decays, drives, dts, A, initial.index_select(0, plan.order), plan)
    outputs = []
    for decay, drive, c in zip(decays, drives, _scan_to_grid(C, plan), strict=True):
        h = torch.addcmul(drive, decay, h)
        outputs.append((h * c.unsqueeze(2)).sum(1))
    # The steps after a document's end have dt = 0, so decay 1 and input 0: the last state passes through unchanged.
    return _scan_from_grid(torch.stack(outputs), plan), initial.index_copy(0, plan.order, h.index_select(0, plan.last))


def selective_scan_torch(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan over packed documents; shapes, types and equations as in `sambay_kernels.selective_scan`.

    Takes about SCAN_CHUNK + longest document / SCAN_CHUNK steps. cu_seqlens is read on the host.
    """
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    work, x, dt = _scan_drive(inputs)
    plan = _scan_plan(cu_seqlens, u.shape[0], u.device)
    a, b, c = A.to(work).t().contiguous(), B.to(work), C.to(work)
    state = None if initial_state is None else initial_state.to(work).transpose(1, 2)
    width = max(16, SCAN_BLOCK_ELEMENTS // max(1, u.shape[0] * A.shape[1]))
    slices = [slice(i, i + width) for i in range(0, u.shape[1], width)] or [slice(0, 0)]
    parts = [
        _scan_channels(dt[:, s], x[:, s], a[:, s], b, c, None if state is None else state[:, :, s], plan)
        for s in slices
    ]
    y, final = torch.cat([part[0] for part in parts], 1), torch.cat([part[1] for part in parts], 2)
    return _scan_output(y, x, inputs).to(u.dtype), final.transpose(1, 2).contiguous()


def selective_scan_step_torch(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    slots: Tensor | None = None,
) -> Tensor:
    """One token of each sequence; shapes as in `sambay_kernels.selective_scan_step`. Without gradients only."""
    inputs = ScanInputs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    work, x, dt = _scan_drive(inputs)
    h = state if slots is None else state[slots]
    h.mul_((dt.unsqueeze(2) * A.to(work)).exp_()).addcmul_((dt * x).unsqueeze(2), B.to(work).unsqueeze(1))
    if slots is not None:
        state[slots] = h
    # Not a product of matrices: those are slow on matrices as narrow as a channel's states.
    y = (h * C.to(work).unsqueeze(1)).sum(2)
    return _scan_output(y, x, inputs).to(u.dtype)


def _scan_drive(inputs: ScanInputs) -> tuple[torch.dtype, Tensor, Tensor]:
    """The type to calculate in, and in that type the input and the time step."""
    work = torch.float64 if inputs.u.dtype == torch.float64 else torch.float32
    dt = inputs.delta.to(work)
    if inputs.delta_bias is not None:
        dt = dt + inputs.delta_bias.to(work)
    if inputs.delta_softplus:
        dt = F.softplus(dt, beta=1.0, threshold=20.0)
    return work, inputs.u.to(work), dt


def _scan_output(y: Tensor, x: Tensor, inputs: ScanInputs) -> Tensor:
    """What leaves the scan: with the input past it, and gated."""
    if inputs.D is not None:
        y = y + inputs.D.to(y.dtype) * x
    if inputs.z is not None:
        y = y * F.silu(inputs.z.to(y.dtype))
    return y
