"""The two attention maps as a pair of torch.library ops: forward and backward, with fakes, autograd and FLOP formulas.

The op ends before the maps are subtracted: what follows is elementwise, and a compiler fuses it with its neighbours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import register
from ..packing import check_cu_seqlens_values
from .torch_backend import diff_maps, diff_maps_backward

OP = "differential_attention"

register(OP, "torch")
register(OP, "reference")


def _bounds(q: Tensor, k: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor) -> tuple[list[int], list[int]]:
    """Document borders on the host, checked: what needs values can't be checked while a graph is traced."""
    check_cu_seqlens_values(cu_seqlens_q, q.shape[0], name="cu_seqlens_q")
    check_cu_seqlens_values(cu_seqlens_k, k.shape[0], name="cu_seqlens_k")
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for s in range(len(bounds_q) - 1):
        queries, keys = bounds_q[s + 1] - bounds_q[s], bounds_k[s + 1] - bounds_k[s]
        if queries > keys:
            raise ValueError(
                f"{OP}: document {s} has {queries} queries but {keys} keys: its queries must be its last tokens"
            )
    return bounds_q, bounds_k


@torch.library.custom_op("sambay_kernels::differential_maps_fwd", mutates_args=(), device_types="cpu")
def differential_maps_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Both softmax maps of every pair of heads: maps (Tq, Hq, 2d) and their log-sum-exp (Tq, Hq). window 0 = none."""
    return diff_maps(q, k, v, *_bounds(q, k, cu_seqlens_q, cu_seqlens_k), window, scale)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


@differential_maps_fwd.register_fake
def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    tokens, heads, d = q.shape
    return q.new_empty(tokens, heads, 2 * d), q.new_empty(tokens, heads, dtype=_wide(q))


@torch.library.custom_op("sambay_kernels::differential_maps_bwd", mutates_args=(), device_types="cpu")
def differential_maps_bwd(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each in its input's type."""
    bounds = _bounds(q, k, cu_seqlens_q, cu_seqlens_k)
    return diff_maps_backward(grad, q, k, v, maps, lse, *bounds, window, scale)


@differential_maps_bwd.register_fake
def _bwd_fake(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, scale = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.plan = (window, scale)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, maps, lse = ctx.saved_tensors
    found = differential_maps_bwd(grad, q, k, v, maps, lse, cu_seqlens_q, cu_seqlens_k, *ctx.plan)
    return (*found, None, None, None, None)


differential_maps_fwd.register_autograd(_backward, setup_context=_setup_context)


def visible_pairs(bounds_q: list[int], bounds_k: list[int], window: int) -> int:
    """How many (query, key) pairs are visible, one head counted."""
    total = 0
    for s in range(len(bounds_q) - 1):
        n, m = bounds_q[s + 1] - bounds_q[s], bounds_k[s + 1] - bounds_k[s]
        reach = min(window, m) if window else m
        growing = min(n, max(0, reach - (m - n)))
        total += growing * (m - n) + growing * (growing + 1) // 2 + (n - growing) * reach
    return total


def _multiply_adds(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int) -> int:
    """Multiply-adds of one product of width d over all visible pairs of all heads."""
    return q.shape[1] * q.shape[2] * visible_pairs(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), window)


@register_flop_formula(torch.ops.sambay_kernels.differential_maps_fwd, get_raw=True)
def differential_maps_flops(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, window: int, *args: Any, **kwargs: Any
) -> int:
    """Scores (width d) and values (width 2d), visible pairs only; padding and softmax aren't counted."""
    return 2 * 3 * _multiply_adds(q, cu_q, cu_k, window)


@register_flop_formula(torch.ops.sambay_kernels.differential_maps_bwd, get_raw=True)
def differential_maps_bwd_flops(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    window: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """Scores again, dq and dk (width d), dv and the weights' gradient (width 2d)."""
    return 2 * 7 * _multiply_adds(q, cu_q, cu_k, window)
