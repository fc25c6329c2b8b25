"""Attention of a decoding step in Triton: keys and values lie in pages, or in the one ring of a slot.

A sequence's keys are cut into chunks by position, so a result depends on no other sequence; each chunk's program leaves
its unnormalised sum, and a second kernel puts them together (flash decoding, arXiv 2205.14135 and its sequel).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _filled(lengths, slot, WINDOW: tl.constexpr):
    """How many tokens the sequence sees, the new one included."""
    count = tl.load(lengths + slot) + 1
    if WINDOW:
        count = tl.minimum(count, WINDOW)
    return count


@triton.jit
def append_kernel(
    new_keys, new_values, keys, values, rows, lengths, table, new_row, table_row,
    HEADS: tl.constexpr, D: tl.constexpr, PADDED: tl.constexpr, PAGE: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Each sequence's new keys and values: at place `length` of its pages, or at that mod WINDOW of its ring."""
    row, e = tl.program_id(0), tl.arange(0, PADDED)
    slot = tl.load(rows + row)
    place = tl.load(lengths + slot)
    if WINDOW:
        place = place % WINDOW
        page = slot
    else:
        page = tl.load(table + slot * table_row + place // PAGE)
    inside = e < HEADS * D
    at = (tl.cast(page, tl.int64) * HEADS + e // D) * (PAGE * D) + (place % PAGE) * D + e % D
    tl.store(keys + at, tl.load(new_keys + row * new_row + e, mask=inside), mask=inside)
    tl.store(values + at, tl.load(new_values + row * new_row + e, mask=inside), mask=inside)


@triton.jit
def attend_kernel(
    q, keys, values, rows, lengths, table, sums, norms, q_row, table_row, scale,
    KEY_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, PAD_V: tl.constexpr, PAGE: tl.constexpr,
    WINDOW: tl.constexpr, QUERIES: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One chunk of one sequence's keys with one pair of key heads: for each of its query heads the sum of weights times
    values (2 * D), unnormalised, and the largest score with the sum of weights. `scale` has log2(e) in it."""
    row, pair, chunk = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot = tl.load(rows + row)
    count = _filled(lengths, slot, WINDOW)
    if chunk * CHUNK < count:
        m, e = tl.arange(0, QUERIES), tl.arange(0, PAD_V)
        # Query m is head 2j + stripe of pair j; a row of zeros beside it, so that one product does for both key heads.
        stripe = m // GROUP
        head = (pair * GROUP + m % GROUP) * 2 + stripe
        mine = (m < 2 * GROUP)[:, None] & ((e // D)[None, :] == stripe[:, None])
        queries = tl.load(q + row * q_row + head[:, None] * D + (e % D)[None, :], mask=mine, other=0.0)
        best = tl.full((QUERIES,), float("-inf"), tl.float32)
        total = tl.zeros((QUERIES,), tl.float32)
        mixed = tl.zeros((QUERIES, PAD_V), tl.float32)
        for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, count), BLOCK):
            t = start + tl.arange(0, BLOCK)
            if WINDOW:
                page = tl.zeros((BLOCK,), tl.int64) + slot
            else:
                page = tl.cast(tl.load(table + slot * table_row + t // PAGE, mask=t < count, other=0), tl.int64)
            base = (page * KEY_HEADS + 2 * pair) * (PAGE * D) + (t % PAGE) * D
            at = base[:, None] + ((e // D) * (PAGE * D) + e % D)[None, :]
            there = (t < count)[:, None] & (e < 2 * D)[None, :]
            k = tl.load(keys + at, mask=there, other=0.0)
            v = tl.load(values + at, mask=there, other=0.0)
            scores = tl.dot(queries, tl.trans(k), input_precision=PRECISION) * scale
            scores = tl.where((t < count)[None, :], scores, float("-inf"))
            larger = tl.maximum(best, tl.max(scores, 1))
            shrink, weights = tl.exp2(best - larger), tl.exp2(scores - larger[:, None])
            total = total * shrink + tl.sum(weights, 1)
            mixed = mixed * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            best = larger
        place = (row * tl.num_programs(2) + chunk) * (tl.num_programs(1) * 2 * GROUP) + head
        tl.store(norms + 2 * place, best, mask=m < 2 * GROUP)
        tl.store(norms + 2 * place + 1, total, mask=m < 2 * GROUP)
        to = sums + tl.cast(place, tl.int64)[:, None] * (2 * D) + e[None, :]
        tl.store(to, mixed, mask=(m < 2 * GROUP)[:, None] & (e < 2 * D)[None, :])


@triton.jit
def _one_map(
    sums,
    norms,
    first,
    step,
    count,
    e,
    WIDTH: tl.constexpr,
    PAD_V: tl.constexpr,
    CHUNKS: tl.constexpr,
    PAD_C: tl.constexpr,
):
    """softmax times values of one head, from its chunks."""
    every = tl.arange(0, PAD_C)
    norm = norms + 2 * (first + every * step)
    best = tl.load(norm, mask=every < count, other=float("-inf"))
    highest = tl.max(best, 0)
    total = tl.sum(tl.exp2(best - highest) * tl.load(norm + 1, mask=every < count, other=0.0), 0)
    mixed = tl.zeros((PAD_V,), tl.float32)
    for begin in range(0, count, CHUNKS):
        c = begin + tl.arange(0, CHUNKS)
        place = first + c * step
        share = tl.exp2(tl.load(norms + 2 * place, mask=c < count, other=float("-inf")) - highest)
        there = (c < count)[:, None] & (e < WIDTH)[None, :]
        part = tl.load(sums + tl.cast(place, tl.int64)[:, None] * WIDTH + e[None, :], mask=there, other=0.0)
        mixed += tl.sum(share[:, None] * part, 0)
    return mixed / total


@triton.jit
def merge_chunks_kernel(
    sums, norms, rows, lengths, lambda_full, subln, out, chunks, factor, eps,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PAD_V: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, PAD_C: tl.constexpr,
):  # fmt: skip
    """One pair of query heads of one sequence: both maps put together, subtracted, normalised, scaled."""
    row, j, e = tl.program_id(0), tl.program_id(1), tl.arange(0, PAD_V)
    count = tl.cdiv(_filled(lengths, tl.load(rows + row), WINDOW), CHUNK)
    first = row * chunks * HEADS + 2 * j
    lam = tl.load(lambda_full).to(tl.float32)
    x = _one_map(sums, norms, first, HEADS, count, e, WIDTH, PAD_V, CHUNKS, PAD_C)
    x -= lam * _one_map(sums, norms, first + 1, HEADS, count, e, WIDTH, PAD_V, CHUNKS, PAD_C)
    scale = tl.load(subln + e, mask=e < WIDTH, other=0.0).to(tl.float32) * factor
    x *= tl.rsqrt(tl.sum(x * x, 0) / WIDTH + eps) * scale
    tl.store(out + row * (HEADS // 2 * WIDTH) + j * WIDTH + e, x.to(out.dtype.element_ty), mask=e < WIDTH)
