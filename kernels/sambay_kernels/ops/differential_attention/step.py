"""One new token of each sequence (decoding)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...native.cpp_build import problem
from ...native.cpp_call import SUFFIXES
from ...runtime.dispatch import backend_for, register
from .checks import check_heads, check_rest, scale_of
from .cpp import differential_attention_step_cpp
from .op import OP as PACKED
from .torch import differential_attention_step_torch

OP = f"{PACKED}_step"

# Not for float16, which C++ would read widened: a step never copies the cache.
register(OP, "cpp", ("cpu",), problem, tuple(SUFFIXES))
register(OP, "torch")


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
    check_heads(q, k, v, 4)
    check_rest(q, lambda_full, subln_weight, lambda_init, eps)
    if key_mask is not None and not isinstance(key_mask, Tensor):
        raise TypeError(f"{OP}: key_mask must be a tensor or None, got {type(key_mask)}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (k.shape[0], k.shape[2])):
        raise ValueError(
            f"{OP}: key_mask must be bool of shape {(k.shape[0], k.shape[2])}, "
            f"got {key_mask.dtype} of shape {tuple(key_mask.shape)}"
        )
    options: dict[str, Any] = {"lambda_init": float(lambda_init), "scale": scale_of(q, scale), "eps": float(eps)}
    # A compiler can't look into C++, and makes fewer loops of the torch form.
    if backend_for(OP, q) == "cpp" and not torch.compiler.is_compiling():
        return differential_attention_step_cpp((q, k, v), lambda_full, subln_weight, key_mask=key_mask, **options)
    return differential_attention_step_torch(q, k, v, lambda_full, subln_weight, key_mask=key_mask, **options)
