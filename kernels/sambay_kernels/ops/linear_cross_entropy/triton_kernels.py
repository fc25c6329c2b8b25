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
        said = inside & (values != float("-inf"))  # what a teacher names is counted apart
        higher = tl.maximum(high, tl.max(values, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        if MOMENT:
            drop = tl.maximum(high - base, -1e4)
            shifted = tl.where(said, values - base, 0.0)
            share = tl.where(said, tl.exp(shifted) * shifted, 0.0)
            weighted = (weighted + mass * drop) * tl.exp(drop) + tl.sum(share, 0)
        mass = mass * tl.exp(high - base) + tl.sum(tl.exp(values - base), 0)
        high = higher
        hit += tl.sum(tl.where(said & (column == target), values, 0.0), 0)
        if SMOOTHING:
            plain += tl.sum(tl.where(said, values, 0.0), 0)
    tl.store(top + row, high)
    tl.store(total + row, mass)
    tl.store(picked + row, hit)
    tl.store(summed + row, plain)
    if MOMENT:
        tl.store(moment + row, weighted)


@triton.jit
def lce_backward_kernel(logits, targets, terms, tokens, out, first, width, logits_row, BLOCK: tl.constexpr):
    """The gradient of the losses to a block of logits, (n, width), from `terms`: factor, norm, slope, share and pull,
    (5, tokens) float32, as `LceTerms` has them, all but the norm to be multiplied by the factor."""
    row = tl.cast(tl.program_id(0), tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    target, scale = tl.load(targets + row) - first, tl.load(terms + row)
    norm, slope = tl.load(terms + tokens + row), tl.load(terms + 2 * tokens + row)
    share, pull = tl.load(terms + 3 * tokens + row), tl.load(terms + 4 * tokens + row)
    values = tl.load(logits + row * logits_row + column, mask=inside, other=float("-inf"))
    grad = tl.exp(values - norm) * slope - share
    grad = scale * (grad - tl.where(column == target, pull, 0.0))
    tl.store(out + row * width + column, grad.to(out.dtype.element_ty), mask=inside)


@triton.jit
def lce_take_kernel(logits, ids, taken, first, width, logits_row, k, K: tl.constexpr):
    """Move the logits of `ids` (n, k) that lie in a block to `taken` (n, k) float32, and leave -inf in their place."""
    row = tl.cast(tl.program_id(0), tl.int64)
    place = tl.arange(0, K)
    column = tl.load(ids + row * k + place, mask=place < k, other=-1) - first
    inside = (place < k) & (column >= 0) & (column < width)
    values = tl.load(logits + row * logits_row + column, mask=inside, other=0.0)
    tl.store(taken + row * k + place, values, mask=inside)
    tl.store(logits + row * logits_row + column, tl.full((K,), float("-inf"), tl.float32), mask=inside)


@triton.jit
def lce_give_kernel(out, ids, values, targets, terms, tokens, first, width, k, K: tl.constexpr):
    """Write the gradient to the logits of `ids` that lie in a block, whose first summand is in `values` (n, k)."""
    row = tl.cast(tl.program_id(0), tl.int64)
    place = tl.arange(0, K)
    column = tl.load(ids + row * k + place, mask=place < k, other=-1) - first
    inside = (place < k) & (column >= 0) & (column < width)
    target, scale = tl.load(targets + row) - first, tl.load(terms + row)
    share, pull = tl.load(terms + 3 * tokens + row), tl.load(terms + 4 * tokens + row)
    grad = tl.load(values + row * k + place, mask=inside, other=0.0) - share
    grad = scale * (grad - tl.where(column == target, pull, 0.0))
    tl.store(out + row * width + column, grad.to(out.dtype.element_ty), mask=inside)
