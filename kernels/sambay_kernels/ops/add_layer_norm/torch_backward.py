"""Residual addition and LayerNorm in plain torch, forward with what the backward pass reads, and backward.

Autograd doesn't record an op's inside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import compute_dtype


def add_layer_norm_torch_forward(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """hidden + delta (None without delta), its LayerNorm, and the mean and 1 / deviation of every row (..., 2)."""
    work = compute_dtype(hidden)
    total = None if delta is None else (hidden + delta).to(hidden.dtype)
    x = (hidden if total is None else total).to(weight.dtype).to(work)
    normed, *stats = torch.native_layer_norm(x, weight.shape, weight.to(work), bias.to(work), eps)
    return total, normed.to(out_dtype), torch.cat(stats, -1)


def add_layer_norm_torch_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    read: Tensor,
    stats: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden; of delta, None where hidden's is it; of weight and bias, None where not wanted."""
    work = stats.dtype
    up, scale = grad.to(work), weight.to(work)
    mean, inverse = stats.split(1, -1)
    unit = (read.to(weight.dtype).to(work) - mean) * inverse
    inner = up * scale
    found = inverse * (inner - inner.mean(-1, keepdim=True) - unit * (inner * unit).mean(-1, keepdim=True))
    if grad_total is not None:
        found += grad_total
    width = weight.shape[0]
    of_weight = (up * unit).reshape(-1, width).sum(0) if want_weight else None
    of_bias = up.reshape(-1, width).sum(0) if want_weight else None
    of_delta = None if delta_dtype == hidden_dtype else found.to(delta_dtype)
    return found.to(hidden_dtype), of_delta, of_weight, of_bias
