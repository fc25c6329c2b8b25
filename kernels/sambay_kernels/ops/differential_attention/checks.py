"""Checks that differential attention and its step share."""

from __future__ import annotations

from torch import Tensor

from ...runtime.checks import check_leading, check_real, check_tensor
from .op import OP


def check_heads(q: Tensor, k: Tensor, v: Tensor, key_dim: int) -> None:
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


def scale_of(q: Tensor, scale: float | None) -> float:
    """The scores' scale, checked; 1/sqrt(d) for None."""
    if scale is None:
        return q.shape[-1] ** -0.5
    check_real(OP, "scale", scale)
    return float(scale)


def check_rest(q: Tensor, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float) -> None:
    """Check what follows the maps."""
    check_tensor(OP, "lambda_full", lambda_full, (), q.device)
    check_tensor(OP, "subln_weight", subln_weight, (2 * q.shape[-1],), q.device)
    check_real(OP, "lambda_init", lambda_init)
    check_real(OP, "eps", eps, least=0.0)
