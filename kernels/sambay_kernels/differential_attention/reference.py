"""Differential attention written as explicit softmax matrices, one document and one head at a time: the oracle."""

import torch
from torch import Tensor


def differential_attention_reference(
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
    """The definition, term by term; quadratic in memory; runs in the dtype it is given (use float64).

    Arguments, shapes and result are those of :func:`sambay_kernels.differential_attention`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    bounds_q = cu_seqlens_q.tolist()
    bounds_k = bounds_q if cu_seqlens_k is None else cu_seqlens_k.tolist()
    documents = [
        _document(q[a:b], k[c:e], v[c:e], lambda_full, subln_weight, lambda_init, window, scale, eps)
        for a, b, c, e in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True)
    ]
    return torch.cat(documents) if documents else q.new_zeros(0, q.shape[1] * q.shape[2])


def _document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    lambda_init: float,
    window: int | None,
    scale: float,
    eps: float,
) -> Tensor:
    """One document: q (n, Hq, d), k, v (m, Hkv, d) -> (n, Hq*d)."""
    n, heads_q, d = q.shape
    m, heads_kv, _ = k.shape
    position_q = torch.arange(m - n, m, device=q.device)[:, None]
    position_k = torch.arange(m, device=q.device)[None, :]
    visible = position_k <= position_q
    if window is not None:
        visible = visible & (position_q - position_k < window)
    output_heads = []
    for j in range(heads_q // 2):
        pair = j // (heads_q // heads_kv)
        values = torch.cat((v[:, 2 * pair], v[:, 2 * pair + 1]), dim=-1)
        attended = []
        for stripe in (0, 1):
            scores = scale * (q[:, 2 * j + stripe] @ k[:, 2 * pair + stripe].T)
            attended.append(scores.masked_fill(~visible, float("-inf")).softmax(-1) @ values)
        out = attended[0] - lambda_full * attended[1]
        out = out / torch.sqrt((out * out).mean(-1, keepdim=True) + eps) * subln_weight * (1.0 - lambda_init)
        output_heads += [out[:, :d], out[:, d:]]
    return torch.cat(output_heads, dim=-1)
