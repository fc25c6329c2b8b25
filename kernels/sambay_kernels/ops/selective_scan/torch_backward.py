"""The backward pass of the scan in plain torch, with the two levels of `torch.py` run backwards.

Written out because autograd doesn't record an op's inside. Only a slice of channels is in memory at a time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...runtime.checks import compute_dtype
from .inputs import ScanInputs
from .torch import (
    SCAN_BLOCK_ELEMENTS,
    _scan_chunk_starts,
    _scan_from_grid,
    _scan_plan,
    _scan_to_grid,
    _ScanPlan,
)


def _grads_at_chunk_ends(local: Tensor, through: Tensor, last: Tensor, plan: _ScanPlan) -> Tensor:
    """Gradient (chunks, N, w) of the state at the end of each chunk.

    local: gradient of each chunk's first state from its own outputs; through: its decay; last: gradient of the
    documents' final states (ranks[0], N, w), longest document first.
    """
    ends: list[Tensor] = []
    start = local[:0]
    for rank in reversed(range(len(plan.ranks))):
        offset, size = sum(plan.ranks[:rank]), plan.ranks[rank]
        # Documents that go on take what comes from their next chunk; those that end here, their final state's gradient.
        ends.append(torch.cat([start, last[start.shape[0] : size]]))
        chunk = slice(offset, offset + size)
        start = torch.addcmul(local[chunk], through[chunk], ends[-1])
    return torch.cat(ends[::-1])


class _Channels(NamedTuple):
    """A slice of channels: dt, x, A, initial as in `_scan_channels`, and the gradients that come in.

    grad: (T, w) of the scan's output; grad_final: (S, N, w).
    """

    dt: Tensor
    x: Tensor
    A: Tensor
    initial: Tensor
    grad: Tensor
    grad_final: Tensor


def _channels_backward(
    channels: _Channels, B: tuple[Tensor, ...], C: tuple[Tensor, ...], plan: _ScanPlan
) -> tuple[Tensor, ...]:
    """Backward for a slice of channels; B, C: grids.

    Returns y (T, w) and the gradients of dt's exponent part (T, w), dt * x (T, w), A (N, w), B, C (grids), initial.
    """
    dt, x, A, initial, grad, grad_final = channels
    dts, inputs, grads = _scan_to_grid(dt, plan), _scan_to_grid(dt * x, plan), _scan_to_grid(grad, plan)
    decays = [torch.exp(step.unsqueeze(1) * A) for step in dts]
    drives = [v.unsqueeze(1) * b.unsqueeze(2) for v, b in zip(inputs, B, strict=True)]
    states = [_scan_chunk_starts(decays, drives, dts, A, initial.index_select(0, plan.order), plan)]
    for decay, drive in zip(decays, drives, strict=True):
        states.append(torch.addcmul(drive, decay, states[-1]))
    y = [(h * c.unsqueeze(2)).sum(1) for h, c in zip(states[1:], C, strict=True)]

    flow = grad_final.index_select(0, plan.order)
    if len(plan.ranks) > 1:
        local = torch.zeros_like(decays[0])
        for decay, g, c in zip(reversed(decays), reversed(grads), reversed(C), strict=True):
            local = torch.addcmul(local, g.unsqueeze(1), c.unsqueeze(2)) * decay
        through = torch.exp(torch.stack(dts).sum(0).unsqueeze(1) * A)
        flow = _grads_at_chunk_ends(local, through, flow, plan)

    grad_A = torch.zeros_like(A)
    found: list[tuple[Tensor, ...]] = []
    for s in reversed(range(plan.steps)):
        g, v = grads[s].unsqueeze(1), inputs[s].unsqueeze(1)
        at_state = torch.addcmul(flow, g, C[s].unsqueeze(2))
        flow = at_state * decays[s]
        at_exponent = flow * states[s]
        grad_A += (at_exponent * dts[s].unsqueeze(1)).sum(0)
        grad_dt, grad_v = (at_exponent * A).sum(1), (at_state * B[s].unsqueeze(2)).sum(1)
        found.append((grad_dt, grad_v, (at_state * v).sum(2), (states[s + 1] * g).sum(2)))
    grad_dt, grad_v, grad_B, grad_C = (torch.stack(steps[::-1]) for steps in zip(*found, strict=True))
    grad_initial = grad_final.index_copy(0, plan.order, flow[: plan.order.shape[0]])
    y_rows, dt_rows, v_rows = (_scan_from_grid(grid, plan) for grid in (torch.stack(y), grad_dt, grad_v))
    return y_rows, dt_rows, v_rows, grad_A, grad_B, grad_C, grad_initial


def selective_scan_torch_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ScanInputs
) -> list[Tensor | None]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state in the compute type; None for None."""
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state = inputs
    work, (total, channels), states = compute_dtype(u), u.shape, A.shape[1]
    plan = _scan_plan(cu_seqlens, total, u.device)
    x, raw = u.to(work), delta.to(work)
    raw = raw if delta_bias is None else raw + delta_bias.to(work)
    dt = F.softplus(raw, beta=1.0, threshold=20.0) if delta_softplus else raw
    g_out = x.new_zeros(x.shape) if grad_y is None else grad_y.to(work)
    g = g_out if z is None else g_out * F.silu(z.to(work))
    shape = (plan.documents, states, channels)
    initial = x.new_zeros(shape) if initial_state is None else initial_state.to(work).transpose(1, 2)
    final = x.new_zeros(shape) if grad_final is None else grad_final.to(work).transpose(1, 2)

    y, grad_dt, grad_v = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(x)
    grad_A, grad_initial = x.new_zeros(states, channels), final.clone()
    grad_B = grad_C = x.new_zeros(plan.steps, plan.chunks, states)
    if plan.chunks:
        a, b, c = A.to(work).t(), _scan_to_grid(B.to(work), plan), _scan_to_grid(C.to(work), plan)
        width = max(16, SCAN_BLOCK_ELEMENTS // (total * states))
        for s in (slice(i, i + width) for i in range(0, channels, width)):
            given = _Channels(dt[:, s], x[:, s], a[:, s], initial[:, :, s], g[:, s], final[:, :, s])
            out = _channels_backward(given, b, c, plan)
            y[:, s], grad_dt[:, s], grad_v[:, s], grad_A[:, s], grad_initial[:, :, s] = *out[:4], out[6]
            grad_B, grad_C = grad_B + out[4], grad_C + out[5]

    slope = torch.where(raw > 20.0, 1.0, torch.sigmoid(raw)) if delta_softplus else 1.0
    grad_delta = (grad_dt + grad_v * x) * slope
    grad_u = grad_v * dt
    grad_z = None
    if D is not None:
        grad_u, y = grad_u + g * D.to(work), y + D.to(work) * x
    if z is not None:
        gate = torch.sigmoid(z.to(work))
        grad_z = g_out * y * gate * (1.0 + z.to(work) * (1.0 - gate))
    return [
        grad_u,
        grad_delta,
        grad_A.t(),
        _scan_from_grid(grad_B, plan),
        _scan_from_grid(grad_C, plan),
        None if D is None else (g * x).sum(0),
        grad_z,
        None if delta_bias is None else grad_delta.sum(0),
        None if initial_state is None else grad_initial.transpose(1, 2),
    ]
