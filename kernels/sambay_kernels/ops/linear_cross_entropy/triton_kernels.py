"""Cross entropy in Triton, one block of the logits at a time: (tokens, block of the vocabulary) float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def lce_forward_kernel(
    logits, targets, top, total, picked, summed, moment, first, width, logits_row, BLOCK: tl.constexpr,
    SMOOTHING: tl.constexpr, MOMENT: tl.constexpr,
):  # fmt: skip
    """Take a block of the vocabulary into each token's running maximum, sum of exponentials, target's logit and sum.

    targets: (n,) int64 token ids; top, total, picked, summed, moment (of x exp(x), x = logit - top): (n,) float32,
    updated; first: the block's first token id.
    """
    row = tl.cast(tl.program_id(0), tl.int64)
    target = tl.load(targets + row) - first
    high, mass = tl.load(top + row), tl.load(total + row)
    hit, plain, weighted = tl.load(picked + row), tl.load(summed + row), tl.load(moment + row)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        values = tl.load(logits + row * logits_row + column, mask=inside, other=float("-inf"))
        higher = tl.maximum(high, tl.max(values, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        if MOMENT:
            drop = tl.maximum(high - base, -1e4)
            shifted = tl.where(inside, values - base, 0.0)
            share = tl.where(inside, tl.exp(shifted) * shifted, 0.0)
            weighted = (weighted + mass * drop) * tl.exp(drop) + tl.sum(share, 0)
        mass = mass * tl.exp(high - base) + tl.sum(tl.exp(values - base), 0)
        high = higher
        hit += tl.sum(tl.where(inside & (column == target), values, 0.0), 0)
        if SMOOTHING:
            plain += tl.sum(tl.where(inside, values, 0.0), 0)
    tl.store(top + row, high)
    tl.store(total + row, mass)
    tl.store(picked + row, hit)
    tl.store(summed + row, plain)
    if MOMENT:
        tl.store(moment + row, weighted)


@triton.jit
def lce_backward_kernel(
    logits, targets, lse, factor, out, first, width, smoothing, z_loss, share, logits_row, BLOCK: tl.constexpr
):
    """The gradient of sum(factor * losses) to a block of logits, (n, width); `share`: label_smoothing / vocabulary."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    target, scale, norm = tl.load(targets + row) - first, tl.load(factor + row), tl.load(lse + row)
    values = tl.load(logits + row * logits_row + column, mask=inside, other=float("-inf"))
    grad = tl.exp(values - norm) * (1.0 + 2.0 * z_loss * norm) - share
    grad = scale * (grad - tl.where(column == target, 1.0 - smoothing, 0.0))
    tl.store(out + row * width + column, grad.to(out.dtype.element_ty), mask=inside)
