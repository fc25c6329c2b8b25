"""Residual addition and LayerNorm as their definition. The oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor


def add_layer_norm_reference(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """hidden + delta, and (x - mean) / sqrt(variance + eps) * weight + bias of it."""
    work = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    total = hidden if delta is None else (hidden.to(work) + delta.to(work)).to(hidden.dtype)
    x = total.to(weight.dtype).to(work)
    centred = x - x.mean(-1, keepdim=True)
    deviation = torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    return total, (centred / deviation * weight.to(work) + bias.to(work)).to(out_dtype)
