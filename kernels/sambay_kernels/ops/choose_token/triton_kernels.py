"""Choosing a token of bfloat16 logits in Triton: by counting, since they are of 65,536 kinds.

All multiprocessors count how often each logit stands in a row; one program a row walks down the counts to where tokens
are kept from; all sum what is kept of a piece of the row, and one finds the piece and in it the token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...triton.functions import LOG2E

KINDS = tl.constexpr(65536)


@triton.jit
def _order(x):
    """The kind of a bfloat16 (as float32): whole numbers from -KINDS // 2, in the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) >> 16


@triton.jit
def _logit(order):
    """The logit of this kind, as float32."""
    bits = order.to(tl.int32) << 16
    bits = tl.where(bits < 0, (bits | 0xFFFF) ^ 0x7FFFFFFF, bits)
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
def _logit_of(kind):
    """The logit of one kind. (By a vector: the interpreter can't cast a single number's bits.)"""
    return tl.max(_logit(tl.zeros((2,), tl.int32) + kind - KINDS // 2), 0)


@triton.jit
def count_kernel(logits, counts, count, stride, BLOCK: tl.constexpr):
    """counts (R, KINDS) of each kind of logit, from the lowest to the highest; of one piece of one row."""
    r, piece = tl.program_id(0), tl.program_id(1)
    at, x = _piece(logits + tl.cast(r, tl.int64) * stride, piece * BLOCK, count, BLOCK)
    tl.atomic_add(counts + r * KINDS + _order(x) + KINDS // 2, 1, mask=at < count, sem="relaxed")


@triton.jit
def _kinds(counts, part, highest, sharpness, least, BINS: tl.constexpr):
    """A run of kinds, their counts, and the weight of one token of each."""
    kind = part * BINS + tl.arange(0, BINS)
    number = tl.load(counts + kind)
    return kind, number, tl.where(number > 0, _weight(_logit(kind - KINDS // 2), highest, sharpness, least), 0.0)


@triton.jit
def _highest(counts, BINS: tl.constexpr):
    """The highest kind that there is."""
    found = 0
    for part in range(0, KINDS // BINS):
        kind = part * BINS + tl.arange(0, BINS)
        found = tl.maximum(found, tl.max(tl.where(tl.load(counts + kind) > 0, kind, 0), 0))
    return found


@triton.jit
def _kept_by_rank(counts, wanted, BINS: tl.constexpr):
    """The kind down to which there are `wanted` tokens, and how many of that kind are among them."""
    above, floor, ties = 0, -1, 0
    for step in range(0, KINDS // BINS):
        kind = (KINDS // BINS - 1 - step) * BINS + tl.arange(0, BINS)
        number = tl.load(counts + kind)
        reached = above + tl.cumsum(number, 0, reverse=True)
        here = (reached >= wanted) & (reached - number < wanted)
        floor = tl.maximum(floor, tl.max(tl.where(here, kind, -1), 0))
        ties += tl.sum(tl.where(here, wanted - (reached - number), 0), 0)
        above += tl.sum(number, 0)
    return floor, ties


@triton.jit
def _mass(counts, floor, highest, sharpness, least, BINS: tl.constexpr):
    """The weight of all tokens above a kind."""
    mass = 0.0
    for part in range(0, KINDS // BINS):
        kind, number, w = _kinds(counts, part, highest, sharpness, least, BINS)
        mass += tl.sum(tl.where(kind > floor, number * w, 0.0), 0)
    return mass


@triton.jit
def _kept_by_mass(counts, floor, need, highest, sharpness, least, BINS: tl.constexpr):
    """The kind, above `floor`, down to which the weights come to `need`, and the weight above it; -1 if none."""
    before, threshold, above = 0.0, -1, 0.0
    for step in range(0, KINDS // BINS):
        kind, number, w = _kinds(counts, KINDS // BINS - 1 - step, highest, sharpness, least, BINS)
        each = tl.where(kind > floor, number * w, 0.0)
        reached = before + tl.cumsum(each, 0, reverse=True)
        there = (reached >= need) & (each > 0.0)
        best = tl.max(tl.where(there, kind, -1), 0)
        if (threshold < 0) & (best >= 0):
            threshold = best
            above = before + tl.sum(tl.where(kind > best, each, 0.0), 0)
        before += tl.sum(each, 0)
    return threshold, above


@triton.jit
def threshold_kernel(
    counts, temperature, top_k, top_p, min_p, randoms, whole, real, best, vocabulary, BINS: tl.constexpr
):  # fmt: skip
    """Of one row: the kind down to which tokens are kept and how many of that kind (whole), and the largest logit, how
    sharp weights are, the least that counts, and how much weight the chosen token has before it (real)."""
    r = tl.program_id(0)
    counts += r * KINDS
    top = _highest(counts, BINS)
    highest = _logit_of(top)
    heat, share, wanted = tl.load(temperature + r), tl.load(top_p + r), tl.load(top_k + r)
    threshold, number, target, sharpness, least = top, top * 0 + 1, 0.0, 1.0, 0.0
    if (heat > 0.0) & (highest < float("inf")) & (highest > float("-inf")):
        sharpness, least = (1.0 / heat) * LOG2E, tl.load(min_p + r)
        floor, ties = top * 0 - 1, top * 0
        if wanted > 0:
            floor, ties = _kept_by_rank(counts, tl.minimum(wanted, vocabulary), BINS)
        edge = _weight(_logit_of(floor), highest, sharpness, least)
        above = _mass(counts, floor, highest, sharpness, least, BINS)
        need = share * (above + tl.where(ties > 0, ties * edge, 0.0))
        threshold, number = floor, ties
        if (share < 1.0) & (above >= need):
            threshold, above = _kept_by_mass(counts, floor, need, highest, sharpness, least, BINS)
            edge = _weight(_logit_of(threshold), highest, sharpness, least)
            number = vocabulary
        if (edge > 0.0) & (number > 0):
            number = tl.minimum(number, tl.maximum(tl.ceil((need - above) / edge), 1.0).to(tl.int32))
            number = tl.minimum(number, tl.load(counts + tl.maximum(threshold, 0)))
            above += number * edge
        target = tl.load(randoms + r).to(tl.float32) * above
    tl.store(whole + 2 * r, threshold)
    tl.store(whole + 2 * r + 1, number)
    tl.store(real + 4 * r, highest)
    tl.store(real + 4 * r + 1, sharpness)
    tl.store(real + 4 * r + 2, least)
    tl.store(real + 4 * r + 3, target)
    tl.store(best + r, highest.to(best.dtype.element_ty))


@triton.jit
def _kept(logits, whole, real, r, piece, count, stride, BLOCK: tl.constexpr):
    """A piece of a row: the weights of what is above the threshold, and what equals it."""
    at, x = _piece(logits + tl.cast(r, tl.int64) * stride, piece * BLOCK, count, BLOCK)
    threshold = tl.load(whole + 2 * r) - KINDS // 2
    highest, sharpness, least = tl.load(real + 4 * r), tl.load(real + 4 * r + 1), tl.load(real + 4 * r + 2)
    order = _order(x)
    above = tl.where((order > threshold) & (at < count), _weight(x, highest, sharpness, least), 0.0)
    equal = ((order == threshold) & (at < count)).to(tl.int32)
    return at, above, equal


@triton.jit
def sum_pieces_kernel(logits, whole, real, masses, ties, count, stride, BLOCK: tl.constexpr):
    """Of one piece of one row: the weight above the threshold, and how many equal it."""
    r, piece = tl.program_id(0), tl.program_id(1)
    _, above, equal = _kept(logits, whole, real, r, piece, count, stride, BLOCK)
    place = r * tl.num_programs(1) + piece
    tl.store(masses + place, tl.sum(above, 0))
    tl.store(ties + place, tl.sum(equal, 0))


@triton.jit
def pick_kernel(
    logits, whole, real, masses, ties, tokens, pieces, count, stride, PIECES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The token of one row: in the order of ids the first at which the weights of what is kept exceed the target."""
    r, p = tl.program_id(0), tl.arange(0, PIECES)
    number, target = tl.load(whole + 2 * r + 1), tl.load(real + 4 * r + 3)
    edge = _weight(
        _logit_of(tl.load(whole + 2 * r)), tl.load(real + 4 * r), tl.load(real + 4 * r + 1),
        tl.load(real + 4 * r + 2),
    )  # fmt: skip
    equal = tl.load(ties + r * pieces + p, mask=p < pieces, other=0)
    earlier = tl.cumsum(equal, 0) - equal
    taken = tl.maximum(tl.minimum(number - earlier, equal), 0)
    mass = tl.load(masses + r * pieces + p, mask=p < pieces, other=0.0) + tl.where(taken > 0, taken * edge, 0.0)
    reached = tl.cumsum(mass, 0)
    filled = tl.max(tl.where(mass > 0.0, p, 0), 0)
    piece = tl.minimum(tl.min(tl.where((reached > target) & (mass > 0.0), p, PIECES), 0), filled)
    before = tl.sum(tl.where(p < piece, mass, 0.0), 0)
    rank = tl.sum(tl.where(p < piece, equal, 0), 0)
    at, above, same = _kept(logits, whole, real, r, piece, count, stride, BLOCK)
    rank += tl.cumsum(same, 0) - same
    w = above + tl.where((same == 1) & (rank < number), edge, 0.0)
    found = tl.min(tl.where((before + tl.cumsum(w, 0) > target) & (w > 0.0), at, count), 0)
    last = tl.max(tl.where(w > 0.0, at, 0), 0)
    tl.store(tokens + r, tl.where(found < count, found, last).to(tl.int64))
