"""Differential attention written as explicit softmax matrices, one document and one head at a time: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import DiffInputs


def differential_attention_reference(
    inputs: DiffInputs, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float
) -> Tensor:
    """The definition, term by term; quadratic in memory; runs in the dtype it is given (use float64).

    Shapes and result are those of :func:`sambay_kernels.differential_attention`.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale = inputs
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    documents = [
        _document(q[a:b], k[c:e], v[c:e], window, scale, lambda_full)
        for a, b, c, e in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True)
    ]
    pairs = torch.cat(documents) if documents else q.new_zeros(0, q.shape[1] // 2, 2 * q.shape[2])
    pairs = pairs / torch.sqrt((pairs * pairs).mean(-1, keepdim=True) + eps) * subln_weight * (1.0 - lambda_init)
    return pairs.flatten(1)


def _document(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float, lambda_full: Tensor) -> Tensor:
    """The subtracted maps of one document: q (n, Hq, d), k, v (m, Hkv, d) -> (n, Hq/2, 2d)."""
    n, heads_q, _ = q.shape
    m, heads_kv, _ = k.shape
    position_q = torch.arange(m - n, m, device=q.device)[:, None]
    position_k = torch.arange(m, device=q.device)[None, :]
    visible = position_k <= position_q
    if window:
        visible = visible & (position_q - position_k < window)
    differences = []
    for j in range(heads_q // 2):
        pair = j // (heads_q // heads_kv)
        values = torch.cat((v[:, 2 * pair], v[:, 2 * pair + 1]), dim=-1)
        attended = []
        for stripe in (0, 1):
            scores = scale * (q[:, 2 * j + stripe] @ k[:, 2 * pair + stripe].T)
            attended.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values)
        differences.append(attended[0] - lambda_full * attended[1])
    return torch.stack(differences, 1)
