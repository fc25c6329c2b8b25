"""Differential attention: two softmax maps of one pair of heads, subtracted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_leading, check_tensor
from ..dispatch import backend_for
from ..packing import check_cu_seqlens_form
from .op import COMBINE, OP, differential_combine_fwd, differential_maps_fwd
from .reference import differential_attention_reference
from .torch_backend import diff_combine, diff_maps_varlen, differential_attention_step_torch

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
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Tensor:
    """Causal differential attention of packed documents (Ye et al. 2024, arXiv 2410.05258, eq. 1-3; no positions).

    Heads are striped as in Phi-4-mini-flash: head 2j+a of q is stripe a of pair j, which attends stripe a of key pair
    j // (Hq // Hkv) and reads that pair's two value heads side by side. Per pair: maps[0] - lambda_full * maps[1],
    RMSNorm over its 2d outputs, times (1 - lambda_init); the first d outputs become head 2j, the last d head 2j+1.

    Args:
        q: (Tq, Hq, d), Hq even.
        k, v: (Tk, Hkv, d), Hkv even and a divisor of Hq; same type and device as q.
        lambda_full: 0-d tensor, the weight of the second map; gets a gradient.
        subln_weight: (2d,), the RMSNorm's weight; gets a gradient.
        lambda_init: the layer's constant.
        cu_seqlens_q, cu_seqlens_k: int32 (S+1,), borders of the documents among queries and keys. A document with fewer
            queries than keys has its last tokens as queries (suffix, decoding); none are allowed. None: k as q.
        window: a query at position t sees keys t-window+1 .. t; None sees all keys up to t.
        scale: of the scores, 1/sqrt(d) if None.
        eps: of the RMSNorm.
        max_length_q, max_length_k: longest document or more, read on CUDA only; left out there, the host has to wait.

    Softmax sums and everything after the maps are float32, or float64 when q is float64. Memory is linear in Tq and Tk.

    Returns:
        (Tq, Hq*d) in q's type, differentiable once.

    Raises:
        ValueError: shapes, types, devices or borders that don't fit, a document with more queries than keys, a window
            below 1, or a SAMBAY_KERNELS that can't be met.
        TypeError: an argument is not a tensor.
    """
    _check_heads(q, k, v, 3)
    _check_scalars(q, lambda_full, subln_weight)
    if window is not None and window < 1:
        raise ValueError(f"{OP}: window must be at least 1 (the query itself) or None, got {window}")
    check_cu_seqlens_form(cu_seqlens_q, q.device, name="cu_seqlens_q")
    check_cu_seqlens_form(cu_seqlens_k, q.device, name="cu_seqlens_k")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"{OP}: {q.shape[0]} queries but {k.shape[0]} keys: pass cu_seqlens_k too")
        cu_seqlens_k = cu_seqlens_q
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{OP}: cu_seqlens_q and cu_seqlens_k must name as many documents, got shapes "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    backend = backend_for(OP, q)
    if backend == "reference":
        return differential_attention_reference(
            q, k, v, lambda_full, subln_weight, lambda_init=lambda_init, cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k, window=window, scale=scale, eps=eps,
        )  # fmt: skip
    if backend == "torch" and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if max_length_q is None or max_length_k is None:
            max_length_q, max_length_k = (int(c.diff().max()) for c in (cu_seqlens_q, cu_seqlens_k))
        # FlashAttention is a registered op with autograd of its own.
        lengths = (max_length_q, max_length_k)
        maps = diff_maps_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, window or 0, scale)
    else:
        maps, _ = differential_maps_fwd(q, k, v, cu_seqlens_q, cu_seqlens_k, window or 0, scale, backend)
    combine = differential_combine_fwd if backend_for(COMBINE, maps) == "triton" else diff_combine
    return combine(maps, lambda_full, subln_weight, lambda_init, eps)


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
    """Differential attention of one new token of each sequence (decoding); no gradient.

    Args:
        q: (B, Hq, d); k, v: (B, Hkv, Tk, d), the caches; heads as in :func:`differential_attention`.
        lambda_full, subln_weight, lambda_init, scale, eps: as there.
        key_mask: (B, Tk) bool, True where a key may be seen; every sequence needs one such key. None sees all. A window
            is a matter of what the cache holds or of this mask.

    Returns:
        (B, Hq*d) in q's type.

    Raises:
        ValueError: shapes, types or devices that don't fit.
        TypeError: an argument is not a tensor.
    """
    _check_heads(q, k, v, 4)
    _check_scalars(q, lambda_full, subln_weight)
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"{OP}_step: key_mask must be bool of shape {(k.shape[0], k.shape[2])}, "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )
    return differential_attention_step_torch(
        q, k, v, lambda_full, subln_weight, lambda_init=lambda_init, key_mask=key_mask, scale=scale, eps=eps
    )


def _check_heads(q: Tensor, k: Tensor, v: Tensor, key_dim: int) -> None:
    """Check q (., Hq, d) and k, v of rank key_dim: (., Hkv, d) or (., Hkv, ., d)."""
    check_leading(OP, "q", q, 3)
    check_leading(OP, "k", k, key_dim)
    check_tensor(OP, "v", v, tuple(k.shape), q.device)
    if k.device != q.device:
        raise ValueError(f"{OP}: k is on {k.device} but q is on {q.device}")
    if k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(f"{OP}: q, k and v must have one type, got {q.dtype}, {k.dtype} and {v.dtype}")
    if k.shape[-1] != q.shape[-1] or q.shape[-1] < 1:
        raise ValueError(f"{OP}: q and k must have one head width, got {q.shape[-1]} and {k.shape[-1]}")
    if key_dim == 4 and k.shape[0] != q.shape[0]:
        raise ValueError(f"{OP}_step: q has {q.shape[0]} sequences but k has {k.shape[0]}")
    heads_q, heads_kv = q.shape[1], k.shape[1]
    if heads_kv < 2 or heads_kv % 2 or heads_q % heads_kv or heads_q < 2:
        raise ValueError(
            f"{OP}: heads come in pairs and query heads are a multiple of key heads, got {heads_q} and {heads_kv}"
        )


def _check_scalars(q: Tensor, lambda_full: Tensor, subln_weight: Tensor) -> None:
    check_tensor(OP, "lambda_full", lambda_full, (), q.device)
    check_tensor(OP, "subln_weight", subln_weight, (2 * q.shape[-1],), q.device)
