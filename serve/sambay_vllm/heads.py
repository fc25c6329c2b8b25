"""Differential attention as grouped-query attention: the order of the heads, and what follows the two maps.

With H query heads, G key-value heads and heads of width d, query head 2j + s is stripe s of pair j. It attends key head
2p + s, p = j // (H / G), and reads value heads 2p and 2p + 1 side by side. That is plain grouped-query attention over G
key heads whose values are 2d wide: queries ordered so that those of one key head stand together, values of a pair given
to both of its key heads. The rest is per token (arXiv 2410.05258, eq. 1-3; striped as in Phi-4-mini-flash).
Needs torch alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

EPS = 1e-5  # of the norm over a pair's outputs; the published model has it written into the code


def grouped_queries(queries: Tensor, kv_heads: int, width: int) -> Tensor:
    """Queries `(T, H, d)` in the order of the key heads they attend, padded with zeros to `(T, H, width)`.

    With two queries to a key head the order within each four is 0, 2, 1, 3.
    """
    tokens, heads, head_dim = queries.shape
    pairs = queries.reshape(tokens, kv_heads // 2, heads // kv_heads, 2, head_dim).transpose(2, 3)
    return _padded(pairs.reshape(tokens, heads, head_dim), width)


def grouped_keys(keys: Tensor, width: int) -> Tensor:
    """Keys `(T, G, d)` as they are, padded with zeros to `(T, G, width)`: zeros add nothing to a score."""
    return _padded(keys, width)


def grouped_values(values: Tensor, width: int) -> Tensor:
    """Values `(T, G, d)` -> `(T, G, width)`: both key heads of a pair get the pair's two value heads side by side."""
    tokens, heads, head_dim = values.shape
    pairs = values.reshape(tokens, heads // 2, 1, 2 * head_dim).expand(-1, -1, 2, -1)
    return _padded(pairs.reshape(tokens, heads, 2 * head_dim), width)


def combine(maps: Tensor, lambda_full: Tensor, weight: Tensor, lambda_init: float, kv_heads: int) -> Tensor:
    """Both maps of every pair -> `(T, H d)`: their difference, RMSNorm over 2d, times 1 - lambda_init.

    Args:
        maps: `(T, H, width)`, what attention gives for `grouped_queries`; columns beyond 2d are padding.
        lambda_full: 0-d, the weight of the second map.
        weight: `(2d,)`, of the norm.

    Computed in float32, or float64 when maps are; the result has the type of maps.
    """
    tokens, heads, _ = maps.shape
    stripes = maps[..., : weight.shape[0]].reshape(tokens, kv_heads // 2, 2, heads // kv_heads, weight.shape[0])
    dtype = torch.promote_types(maps.dtype, torch.float32)
    first, second = stripes.to(dtype).unbind(2)
    pairs = first - lambda_full.to(dtype) * second
    normed = F.rms_norm(pairs, (weight.shape[0],), weight.to(dtype), EPS) * (1.0 - lambda_init)
    return normed.reshape(tokens, -1).to(maps.dtype)


def _padded(heads: Tensor, width: int) -> Tensor:
    missing = width - heads.shape[-1]
    return F.pad(heads, (0, missing)) if missing else heads.contiguous()
