"""Residual addition and LayerNorm in plain torch.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def add_layer_norm_torch(
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float = 1e-5,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """hidden + delta and its LayerNorm, as in `sambay_kernels.add_layer_norm`."""
    total = hidden if delta is None else (hidden + delta).to(hidden.dtype)
    normed = F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps)
    return total, normed.to(out_dtype or weight.dtype)
