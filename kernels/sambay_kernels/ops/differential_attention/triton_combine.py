"""What follows the two maps, in one Triton kernel each way: their subtraction, RMSNorm and scale."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair(maps, lam, row, inside, e, WIDTH: tl.constexpr):
    """maps[0] - lambda * maps[1] of a run of pairs, and maps[1]; float32. Pair i stands at rows 2i and 2i + 1."""
    mask = inside[:, None] & (e < WIDTH)[None, :]
    place = tl.cast(row, tl.int64)[:, None] * (2 * WIDTH) + e[None, :]
    first = tl.load(maps + place, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(maps + place + WIDTH, mask=mask, other=0.0).to(tl.float32)
    return first - lam * second, second, place, mask


@triton.jit
def combine_forward_kernel(
    maps, lambda_full, weight, out, count, factor, eps, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    """out (T * pairs, 2d): RMSNorm(maps[0] - lambda * maps[1]) * weight * factor."""
    row, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    lam = tl.load(lambda_full).to(tl.float32)
    x, _, _, mask = _pair(maps, lam, row, row < count, e, WIDTH)
    scale = tl.load(weight + e, mask=e < WIDTH, other=0.0).to(tl.float32) * factor
    x *= tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)[:, None] * scale[None, :]
    tl.store(out + tl.cast(row, tl.int64)[:, None] * WIDTH + e[None, :], x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def combine_backward_kernel(
    grad, maps, lambda_full, weight, grad_maps, grad_lambda, grad_weight, count, factor, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """grad_maps; grad_lambda (n,) and grad_weight (n, 2d): each program's own sum over ROWS * STEPS pairs."""
    program, e = tl.program_id(0), tl.arange(0, PADDED)
    lam = tl.load(lambda_full).to(tl.float32)
    scale = tl.load(weight + e, mask=e < WIDTH, other=0.0).to(tl.float32) * factor
    sum_weight = tl.zeros((PADDED,), tl.float32)
    sum_lambda = tl.zeros((ROWS,), tl.float32)
    for step in range(0, STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        x, second, place, mask = _pair(maps, lam, row, row < count, e, WIDTH)
        upstream = tl.load(grad + tl.cast(row, tl.int64)[:, None] * WIDTH + e[None, :], mask=mask, other=0.0)
        upstream = upstream.to(tl.float32)
        r = tl.rsqrt(tl.sum(x * x, 1) / WIDTH + eps)
        sum_weight += tl.sum(upstream * x * r[:, None], 0)
        inner = upstream * scale[None, :]
        of_x = r[:, None] * (inner - x * (r * r * tl.sum(inner * x, 1) / WIDTH)[:, None])
        sum_lambda -= tl.sum(of_x * second, 1)
        tl.store(grad_maps + place, of_x.to(grad_maps.dtype.element_ty), mask=mask)
        tl.store(grad_maps + place + WIDTH, (-lam * of_x).to(grad_maps.dtype.element_ty), mask=mask)
    tl.store(grad_weight + program * WIDTH + e, sum_weight * factor, mask=e < WIDTH)
    tl.store(grad_lambda + program, tl.sum(sum_lambda, 0))
