"""Differential attention (Differential Transformer, arXiv 2410.05258) as SambaY uses it (arXiv 2507.06607)."""

import math

import torch
from torch import Tensor

from .torch_backend import diff_attention_packed, diff_attention_step

__all__ = ["differential_attention", "differential_attention_step"]


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Causal differential attention over packed documents."""
    return diff_attention_packed(
        q,
        k,
        v,
        lambda_full,
        subln_weight,
        lambda_init,
        cu_seqlens_q,
        cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k,
        window,
        1.0 / math.sqrt(q.shape[-1]) if scale is None else scale,
        eps,
    )


@torch.no_grad()
def differential_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Differential attention of one new token per sequence (decoding)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return diff_attention_step(q, k, v, lambda_full, subln_weight, lambda_init, key_mask, scale, eps)
