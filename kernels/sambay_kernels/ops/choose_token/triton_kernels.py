"""Choosing a token in Triton: a program takes a row and finds, by halving, from which logit on tokens are kept.

Logits are compared as whole numbers of the same order, of which bfloat16 has 65,536: sixteen passes over a row that
lies in the cache, where sorting would move it about.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import LOG2E


@triton.jit
def _order(x, SHIFT: tl.constexpr):
    """A whole number for each float32, in the same order; the lower SHIFT bits, which are all alike, left out."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> SHIFT


@triton.jit
def _logit(order, SHIFT: tl.constexpr):
    """The float32 of this order."""
    bits = order.to(tl.int32) << SHIFT
    bits = tl.where(bits < 0, (bits | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, bits)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _piece(row, start, count, BLOCK: tl.constexpr):
    """A run of a row's logits, -inf behind its end."""
    at = start + tl.arange(0, BLOCK)
    return at, tl.load(row + at, mask=at < count, other=float("-inf")).to(tl.float32)


@triton.jit
def _weight(x, highest, sharpness, least):
    """Probability over the largest one, 0 below `least`."""
    w = tl.exp2((x - highest) * sharpness)
    return tl.where(w >= least, w, 0.0)


@triton.jit
def _from(row, count, threshold, highest, sharpness, least, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """How many logits are at least `threshold`, and the weight of those."""
    number, mass = tl.zeros((BLOCK,), tl.int32), tl.zeros((BLOCK,), tl.float32)
    threshold = threshold.to(tl.int32)  # a whole register less for each logit
    for start in range(0, count, BLOCK):
        at, x = _piece(row, start, count, BLOCK)
        inside = (_order(x, SHIFT) >= threshold) & (at < count)
        number += inside.to(tl.int32)
        mass += tl.where(inside, _weight(x, highest, sharpness, least), 0.0)
    return tl.sum(number, 0), tl.sum(mass, 0)


@triton.jit
def choose_kernel(
    logits, temperature, top_k, top_p, min_p, randoms, tokens, best, count, stride,
    BLOCK: tl.constexpr, SHIFT: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """tokens and the largest logit of one row; see `choose_token`."""
    r = tl.program_id(0)
    row = logits + tl.cast(r, tl.int64) * stride
    highest, token = float("-inf"), 0
    for start in range(0, count, BLOCK):
        at, x = _piece(row, start, count, BLOCK)
        # NaN is neither larger nor smaller; it has to come out of here.
        x = tl.where(x == x, x, float("inf"))
        here = tl.max(x, 0)
        first = tl.min(tl.where(x == here, at, count), 0)
        token = tl.where(here > highest, first, token)
        highest = tl.maximum(highest, here)
    heat = tl.load(temperature + r)
    if (heat > 0.0) & (highest < float("inf")) & (highest > float("-inf")):
        sharpness, least = LOG2E / heat, tl.load(min_p + r)
        most = tl.load(top_k + r)
        top = _order(highest, SHIFT).to(tl.int64)
        floor, ties = top * 0 + LOWEST, count
        if most > 0:
            floor, ties = _of_count(row, count, floor, top, tl.minimum(most, count), BLOCK, SHIFT)
        _, above = _from(row, count, floor + 1, highest, sharpness, least, BLOCK, SHIFT)
        edge, whole, share = 0.0, above, tl.load(top_p + r)
        if most > 0:
            edge = _weight(_logit(floor, SHIFT), highest, sharpness, least)
            whole += ties * edge
        need = share * whole
        threshold, number = floor, ties
        if (share < 1.0) & (above >= need):
            # The least of what is kept and all below it hold 1 - top_p: it can't be smaller than an equal part of that.
            part = highest + tl.log2(tl.maximum((1.0 - share) / count, 1e-30)) / sharpness
            low = tl.maximum(floor, tl.minimum(_order(part, SHIFT).to(tl.int64) - 2, top - 1)) + 1
            threshold = _of_mass(row, count, low, top, need, highest, sharpness, least, BLOCK, SHIFT)
            _, above = _from(row, count, threshold + 1, highest, sharpness, least, BLOCK, SHIFT)
            edge = _weight(_logit(threshold, SHIFT), highest, sharpness, least)
            number = count
        if edge > 0.0:
            number = tl.minimum(number, tl.maximum(tl.ceil((need - above) / edge), 1.0).to(tl.int32))
        mass = above + tl.where(edge > 0.0, number * edge, 0.0)
        target = tl.load(randoms + r).to(tl.float32) * mass
        token = _invert(row, count, threshold, number, target, highest, sharpness, least, BLOCK, SHIFT)
    tl.store(tokens + r, token.to(tl.int64))
    tl.store(best + r, highest.to(best.dtype.element_ty))


@triton.jit
def _of_count(row, count, low, high, wanted, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """The largest threshold that at least `wanted` logits reach, and how many of those that equal it are wanted."""
    while low < high:
        middle = low + (high - low + 1) // 2
        number, _ = _from(row, count, middle, 0.0, 1.0, 0.0, BLOCK, SHIFT)
        low = tl.where(number >= wanted, middle, low)
        high = tl.where(number >= wanted, high, middle - 1)
    above, _ = _from(row, count, low + 1, 0.0, 1.0, 0.0, BLOCK, SHIFT)
    return low, wanted - above


@triton.jit
def _of_mass(row, count, low, high, need, highest, sharpness, least, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """The largest threshold from which on the weights come to at least `need`."""
    while low < high:
        middle = low + (high - low + 1) // 2
        _, mass = _from(row, count, middle, highest, sharpness, least, BLOCK, SHIFT)
        low = tl.where(mass >= need, middle, low)
        high = tl.where(mass >= need, high, middle - 1)
    return low


@triton.jit
def _invert(row, count, threshold, number, target, highest, sharpness, least, BLOCK: tl.constexpr, SHIFT: tl.constexpr):
    """The id at which the weights of what is kept, summed in the order of ids, first exceed `target`."""
    before, ties, token, last = 0.0, 0, count, 0
    threshold = threshold.to(tl.int32)
    for start in range(0, count, BLOCK):
        at, x = _piece(row, start, count, BLOCK)
        place = _order(x, SHIFT)
        equal = ((place == threshold) & (at < count)).to(tl.int32)
        rank = ties + tl.cumsum(equal, 0) - equal
        kept = (place > threshold) | ((equal == 1) & (rank < number))
        w = tl.where(kept & (at < count), _weight(x, highest, sharpness, least), 0.0)
        reached = before + tl.cumsum(w, 0)
        token = tl.minimum(token, tl.min(tl.where((reached > target) & (w > 0.0), at, count), 0))
        last = tl.maximum(last, tl.max(tl.where(w > 0.0, at, 0), 0))
        before += tl.sum(w, 0)
        ties += tl.sum(equal, 0)
    return tl.where(token < count, token, last)
