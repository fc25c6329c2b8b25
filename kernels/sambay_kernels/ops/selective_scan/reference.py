"""Selective scan as the paper writes it: one document, one token after another. The oracle of every other backend."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import ScanInputs


def selective_scan_reference(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t;  y_t = C_t h_t + D u_t, times silu(z_t).

    Mamba (Gu and Dao 2023), equations 2a, 2b with the simplified discretisation of B. Shapes as in `selective_scan`.
    Arithmetic in float64 when u is float64, else in float32. Differentiable, any order.
    """
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state = inputs
    work = torch.float64 if u.dtype == torch.float64 else torch.float32
    total, channels = u.shape
    x, dt, a = u.to(work), delta.to(work), A.to(work)
    if delta_bias is not None:
        dt = dt + delta_bias.to(work)
    if delta_softplus:
        dt = F.softplus(dt, beta=1.0, threshold=20.0)
    borders = [0, total] if cu_seqlens is None else cu_seqlens.tolist()
    # unbind, not indexing: the backward of x[t] writes a whole tensor for every t.
    steps = list(zip(x.unbind(0), dt.unbind(0), B.to(work).unbind(0), C.to(work).unbind(0), strict=True))
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for document, (start, end) in enumerate(itertools.pairwise(borders)):
        if initial_state is None:
            h = torch.zeros(channels, A.shape[1], dtype=work, device=u.device)
        else:
            h = initial_state[document].to(work)
        for x_t, dt_t, b_t, c_t in steps[start:end]:
            h = torch.exp(dt_t[:, None] * a) * h + (dt_t * x_t)[:, None] * b_t[None, :]
            outputs.append((h * c_t[None, :]).sum(-1))
        finals.append(h)
    y = torch.stack(outputs) if outputs else x * 0
    final = torch.stack(finals) if finals else torch.zeros(0, channels, A.shape[1], dtype=work, device=u.device)
    if D is not None:
        y = y + D.to(work) * x
    if z is not None:
        y = y * F.silu(z.to(work))
    return y.to(u.dtype), final
