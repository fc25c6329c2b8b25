"""Differential attention by Triton kernels: plans, buffers, launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.segments import Segments, power_of_two, segments
from ...triton.launch import compute_capability, launch
from .inputs import DiffInputs


class Blocks(NamedTuple):
    """Queries and keys at once in each kernel of the maps."""

    forward: tuple[int, int]
    backward_q: tuple[int, int]
    backward_kv: tuple[int, int]


# By major compute capability. 9: as measured on an H100. 8: what spills no registers there; not measured.
BLOCKS = {8: Blocks((64, 64), (64, 64), (64, 32)), 9: Blocks((128, 32), (128, 32), (32, 64))}
# Exact float32 products take no tensor cores but registers for all their factors: larger blocks spill kilobytes.
SINGLE_BLOCKS = {8: Blocks((32, 32), (32, 32), (32, 16)), 9: Blocks((32, 32), (32, 32), (32, 32))}
COMBINE_ROWS, COMBINE_STEPS = 16, 16  # pairs of heads at once, and how many times in the backward
LOG2E = 1.4426950408889634


def _blocks_for(q: Tensor) -> Blocks:
    """Those of the newest generation that is not newer than the device's."""
    blocks, major = SINGLE_BLOCKS if q.dtype == torch.float32 else BLOCKS, compute_capability(q.device)
    return blocks[max((known for known in blocks if known <= major), default=min(blocks))]


def _heads(value: Tensor) -> Tensor:
    """(T, H, d) whose rows may stand apart, but hold their heads side by side."""
    return value if value.stride(2) == 1 and value.stride(1) == value.shape[2] else value.contiguous()


def _options(q: Tensor, blocks: tuple[int, int]) -> dict[str, Any]:
    """Compile-time constants of the map kernels; float32 products are exact, not rounded to TF32."""
    d = q.shape[2]
    return {
        "D": d,
        "PAD_D": max(16, power_of_two(d)),
        "PAD_V": max(16, power_of_two(2 * d)),
        "BLOCK_Q": blocks[0],
        "BLOCK_K": blocks[1],
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }


def _blocks(cut: Segments, queries: Tensor, keys: Tensor) -> tuple[Tensor, ...]:
    return cut.start, cut.end, cut.document, queries, keys


def diff_maps_triton(inputs: DiffInputs) -> tuple[Tensor, Tensor]:
    """maps (Tq, Hq, 2d) in q's type and their log-sum-exp (Tq, Hq) in float32."""
    from .triton_maps import maps_forward_kernel

    (q, k, v), (cu_seqlens_q, cu_seqlens_k, window, scale) = map(_heads, inputs[:3]), inputs[3:]
    (tokens, heads, d), pairs = q.shape, k.shape[1] // 2
    maps, lse = q.new_empty(tokens, heads, 2 * d), q.new_empty(tokens, heads, dtype=torch.float32)
    blocks = _blocks_for(q).forward
    cut = segments(cu_seqlens_q, tokens, blocks[0], q.device)
    launch(
        maps_forward_kernel, (cut.start.shape[0], heads), q, k, v, maps, lse,
        *_blocks(cut, cu_seqlens_q, cu_seqlens_k), heads, heads // (2 * pairs), q.stride(0), k.stride(0), v.stride(0),
        window, scale * LOG2E, **_options(q, blocks),
    )  # fmt: skip
    return maps, lse


def diff_maps_triton_backward(
    grad: Tensor, inputs: DiffInputs, maps: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each in its input's type."""
    from .triton_maps import maps_backward_kv_kernel, maps_backward_q_kernel

    (q, k, v), (cu_seqlens_q, cu_seqlens_k, window, scale) = map(_heads, inputs[:3]), inputs[3:]
    grad, maps, lse = grad.contiguous(), maps.contiguous(), lse.contiguous()
    (tokens, heads, _), keys, pairs = q.shape, k.shape[0], k.shape[1] // 2
    grad_q, grad_k, grad_v = (x.new_empty(x.shape) for x in (q, k, v))
    inner = torch.empty_like(lse)
    strides = (q.stride(0), k.stride(0), v.stride(0))
    group, blocks = heads // (2 * pairs), _blocks_for(q)
    cut = segments(cu_seqlens_q, tokens, blocks.backward_q[0], q.device)
    launch(
        maps_backward_q_kernel, (cut.start.shape[0], heads), grad, q, k, v, maps, lse, inner, grad_q,
        *_blocks(cut, cu_seqlens_q, cu_seqlens_k), heads, group, *strides, window, scale,
        **_options(q, blocks.backward_q),
    )  # fmt: skip
    cut = segments(cu_seqlens_k, keys, blocks.backward_kv[1], q.device)
    launch(
        maps_backward_kv_kernel, (cut.start.shape[0], pairs), grad, q, k, v, lse, inner, grad_k, grad_v,
        *_blocks(cut, cu_seqlens_q, cu_seqlens_k), heads, pairs, group, *strides, window, scale, stages=2,
        **_options(q, blocks.backward_kv),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def diff_combine_triton(
    maps: Tensor, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float
) -> Tensor:
    """maps (T, Hq, 2d) -> (T, Hq*d): subtracted, normalised, scaled."""
    from .triton_combine import combine_forward_kernel

    tokens, heads, width = maps.shape
    maps, count = maps.contiguous(), tokens * heads // 2
    out = maps.new_empty(tokens, heads * width // 2)
    launch(
        combine_forward_kernel, (-(-count // COMBINE_ROWS),), maps, lambda_full, subln_weight.contiguous(), out, count,
        1.0 - lambda_init, eps, WIDTH=width, PADDED=power_of_two(width), ROWS=COMBINE_ROWS,
    )  # fmt: skip
    return out


def diff_combine_triton_backward(
    grad: Tensor, maps: Tensor, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, lambda_full and subln_weight, each in its input's type."""
    from .triton_combine import combine_backward_kernel

    tokens, heads, width = maps.shape
    maps, grad, count = maps.contiguous(), grad.contiguous(), tokens * heads // 2
    programs = -(-count // (COMBINE_ROWS * COMBINE_STEPS))
    grad_maps = maps.new_empty(maps.shape)
    sum_lambda = maps.new_empty(programs, dtype=torch.float32)
    sum_weight = maps.new_empty(programs, width, dtype=torch.float32)
    launch(
        combine_backward_kernel, (programs,), grad, maps, lambda_full, subln_weight.contiguous(), grad_maps, sum_lambda,
        sum_weight, count, 1.0 - lambda_init, eps, WIDTH=width, PADDED=power_of_two(width), ROWS=COMBINE_ROWS,
        STEPS=COMBINE_STEPS,
    )  # fmt: skip
    return grad_maps, sum_lambda.sum().to(lambda_full.dtype), sum_weight.sum(0).to(subln_weight.dtype)
