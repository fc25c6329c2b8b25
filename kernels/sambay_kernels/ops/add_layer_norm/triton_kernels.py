"""Residual addition and LayerNorm in Triton: a program takes whole rows."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _place(row, count, e, WIDTH: tl.constexpr):
    """Offsets of the elements of rows, and which of them there are."""
    return tl.cast(row, tl.int64)[:, None] * WIDTH + e[None, :], (row < count)[:, None] & (e < WIDTH)[None, :]


@triton.jit
def add_layer_norm_forward_kernel(
    hidden, delta, weight, bias, total, normed, stats, count, eps,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """total = hidden + delta where there is a delta, its LayerNorm, and its mean and 1 / deviation (count, 2)."""
    row, e = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, PADDED)
    place, mask = _place(row, count, e, WIDTH)
    x = tl.load(hidden + place, mask=mask, other=0.0).to(tl.float32)
    if delta is not None:
        x += tl.load(delta + place, mask=mask, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + place, rounded, mask=mask)
        x = rounded.to(tl.float32)
    x = x.to(weight.dtype.element_ty).to(tl.float32)
    mean = tl.sum(x, 1) / WIDTH
    centred = tl.where(mask, x - mean[:, None], 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)
    w = tl.load(weight + e, mask=e < WIDTH, other=0.0).to(tl.float32)
    b = tl.load(bias + e, mask=e < WIDTH, other=0.0).to(tl.float32)
    y = centred * inverse[:, None] * w[None, :] + b[None, :]
    tl.store(normed + place, y.to(normed.dtype.element_ty), mask=mask)
    tl.store(stats + 2 * row, mean, mask=row < count)
    tl.store(stats + 2 * row + 1, inverse, mask=row < count)


@triton.jit
def add_layer_norm_backward_kernel(
    grad, grad_total, read, stats, weight, of_total, of_delta, of_weight, of_bias, count,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """of_total and, in its type, of_delta; of_weight and of_bias (n, W): each program's sums over ROWS * STEPS rows."""
    program, e = tl.program_id(0), tl.arange(0, PADDED)
    w = tl.load(weight + e, mask=e < WIDTH, other=0.0).to(tl.float32)
    sum_weight, sum_bias = tl.zeros((PADDED,), tl.float32), tl.zeros((PADDED,), tl.float32)
    for step in range(0, STEPS):
        row = (program * STEPS + step) * ROWS + tl.arange(0, ROWS)
        place, mask = _place(row, count, e, WIDTH)
        mean = tl.load(stats + 2 * row, mask=row < count, other=0.0)
        inverse = tl.load(stats + 2 * row + 1, mask=row < count, other=0.0)
        x = tl.load(read + place, mask=mask, other=0.0).to(weight.dtype.element_ty).to(tl.float32)
        up = tl.load(grad + place, mask=mask, other=0.0).to(tl.float32)
        unit = (x - mean[:, None]) * inverse[:, None]
        inner = up * w[None, :]
        of_x = inner - (tl.sum(inner, 1) / WIDTH)[:, None] - unit * (tl.sum(inner * unit, 1) / WIDTH)[:, None]
        of_x *= inverse[:, None]
        if grad_total is not None:
            of_x += tl.load(grad_total + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(of_total + place, of_x.to(of_total.dtype.element_ty), mask=mask)
        if of_delta is not None:
            tl.store(of_delta + place, of_x.to(of_delta.dtype.element_ty), mask=mask)
        if of_weight is not None:
            sum_weight += tl.sum(up * unit, 0)
            sum_bias += tl.sum(up, 0)
    if of_weight is not None:
        here = tl.cast(program, tl.int64) * WIDTH + e
        tl.store(of_weight + here, sum_weight, mask=e < WIDTH)
        tl.store(of_bias + here, sum_bias, mask=e < WIDTH)
