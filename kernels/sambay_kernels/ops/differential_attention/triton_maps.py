"""The two attention maps of every pair of heads in Triton: each score computed once, values as wide as a pair.

FlashAttention-2 (Dao 2023, arXiv 2307.08691, algorithms 1 and 2) with keys of width d and values of width 2d, for
packed documents whose queries are their last tokens. A program of the forward and of the queries' gradient takes
BLOCK_Q queries of one document and one head; one of the keys' gradient takes BLOCK_K keys and one pair of key heads
with all query heads that read it, so that nothing is added across programs and the same input gives the same bits.

Scores are in powers of two: scale_log2 = scale * log2(e). `lse` is the natural logarithm of the softmax's sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, first, row_stride, limit, columns, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows from `first` on, those below a limit, of a matrix of WIDTH columns as they are stored; else zero.

    Only the tile's corner needs 64 bits; offsets inside it would take twice the registers.
    """
    line = tl.arange(0, ROWS)
    corner = pointer + tl.cast(first, tl.int64) * row_stride
    mask = (line < limit - first)[:, None] & (columns < WIDTH)[None, :]
    return tl.load(corner + line[:, None] * row_stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _visible(positions_q, positions_k, window, keys):
    """Whether a document's queries see its keys: those up to themselves, the last `window` of them unless it is 0."""
    behind = positions_q - positions_k
    reach = tl.where(window > 0, window, keys)
    return (behind >= 0) & (behind < reach) & (positions_k < keys)


@triton.jit
def maps_forward_kernel(
    q, k, v, maps, lse, starts, ends, documents, borders_q, borders_k,
    heads, group, q_row, k_row, v_row, window, scale_log2,
    D: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """maps (Tq, Hq, 2d) and lse (Tq, Hq)."""
    block, head = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + block)
    if document < 0:
        return
    start, end = tl.load(starts + block), tl.load(ends + block)
    first_q, first_k = tl.load(borders_q + document), tl.load(borders_k + document)
    keys = tl.load(borders_k + document + 1) - first_k
    ahead = keys - (tl.load(borders_q + document + 1) - first_q) - first_q  # position of query row r: r + ahead
    pair = head // 2 // group
    rows, d, e = start + tl.arange(0, BLOCK_Q), tl.arange(0, PAD_D), tl.arange(0, PAD_V)
    queries = _tile(q + head * D, start, q_row, end, d, BLOCK_Q, D)
    top = tl.full((BLOCK_Q,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    out = tl.zeros((BLOCK_Q, PAD_V), tl.float32)
    low = tl.where(window > 0, tl.maximum(start + ahead - window + 1, 0), 0) // BLOCK_K * BLOCK_K
    high = tl.where(end > start, end + ahead, low)
    for column in range(low, high, BLOCK_K):
        at = column + tl.arange(0, BLOCK_K)
        key = _tile(k + (2 * pair + head % 2) * D, first_k + column, k_row, first_k + keys, d, BLOCK_K, D)
        value = _tile(v + 2 * pair * D, first_k + column, v_row, first_k + keys, e, BLOCK_K, 2 * D)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * scale_log2
        scores = tl.where(_visible((rows + ahead)[:, None], at[None, :], window, keys), scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        out = out * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision=PRECISION)
        top = higher
    inside = rows < end
    total = tl.where(inside, total, 1.0)
    out = out / total[:, None]
    place = tl.cast(rows, tl.int64) * heads + head
    tl.store(
        maps + place[:, None] * (2 * D) + e[None, :], out.to(maps.dtype.element_ty),
        mask=inside[:, None] & (e < 2 * D)[None, :],
    )  # fmt: skip
    tl.store(lse + place, top * LN2 + tl.log(total), mask=inside)


@triton.jit
def maps_backward_q_kernel(
    grad, q, k, v, maps, lse, inner, grad_q, starts, ends, documents, borders_q, borders_k,
    heads, group, q_row, k_row, v_row, window, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_q, and for the other kernel `inner` (Tq, Hq): each output's product with its gradient."""
    block, head = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + block)
    if document < 0:
        return
    start, end = tl.load(starts + block), tl.load(ends + block)
    first_q, first_k = tl.load(borders_q + document), tl.load(borders_k + document)
    keys = tl.load(borders_k + document + 1) - first_k
    ahead = keys - (tl.load(borders_q + document + 1) - first_q) - first_q
    pair = head // 2 // group
    rows, d, e = start + tl.arange(0, BLOCK_Q), tl.arange(0, PAD_D), tl.arange(0, PAD_V)
    inside = rows < end
    queries = _tile(q + head * D, start, q_row, end, d, BLOCK_Q, D)
    upstream = _tile(grad + head * 2 * D, start, heads * 2 * D, end, e, BLOCK_Q, 2 * D)
    output = _tile(maps + head * 2 * D, start, heads * 2 * D, end, e, BLOCK_Q, 2 * D)
    place = tl.cast(rows, tl.int64) * heads + head
    product = tl.sum(upstream.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(inner + place, product, mask=inside)
    norm = tl.load(lse + place, mask=inside, other=0.0) * LOG2E
    out = tl.zeros((BLOCK_Q, PAD_D), tl.float32)
    low = tl.where(window > 0, tl.maximum(start + ahead - window + 1, 0), 0) // BLOCK_K * BLOCK_K
    high = tl.where(end > start, end + ahead, low)
    for column in range(low, high, BLOCK_K):
        at = column + tl.arange(0, BLOCK_K)
        key = _tile(k + (2 * pair + head % 2) * D, first_k + column, k_row, first_k + keys, d, BLOCK_K, D)
        value = _tile(v + 2 * pair * D, first_k + column, v_row, first_k + keys, e, BLOCK_K, 2 * D)
        scores = tl.dot(queries, tl.trans(key), input_precision=PRECISION) * (scale * LOG2E)
        seen = _visible((rows + ahead)[:, None], at[None, :], window, keys)
        weights = tl.where(seen, tl.exp2(scores - norm[:, None]), 0.0)
        slope = tl.dot(upstream, tl.trans(value), input_precision=PRECISION) - product[:, None]
        out += tl.dot((weights * slope).to(key.dtype), key, input_precision=PRECISION)
    tl.store(
        grad_q + place[:, None] * D + d[None, :], (out * scale).to(grad_q.dtype.element_ty),
        mask=inside[:, None] & (d < D)[None, :],
    )  # fmt: skip


@triton.jit
def maps_backward_kv_kernel(
    grad, q, k, v, lse, inner, grad_k, grad_v, starts, ends, documents, borders_q, borders_k,
    heads, pairs, group, q_row, k_row, v_row, window, scale,
    D: tl.constexpr, PAD_D: tl.constexpr, PAD_V: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """grad_k (Tk, Hkv, d) and grad_v (Tk, Hkv, d) of one pair of key heads."""
    block, pair = tl.program_id(0), tl.program_id(1)
    document = tl.load(documents + block)
    if document < 0:
        return
    start, end = tl.load(starts + block), tl.load(ends + block)
    first_q, first_k = tl.load(borders_q + document), tl.load(borders_k + document)
    last_q, keys = tl.load(borders_q + document + 1), tl.load(borders_k + document + 1) - first_k
    ahead = keys - (last_q - first_q) - first_q
    rows, d, e = start + tl.arange(0, BLOCK_K), tl.arange(0, PAD_D), tl.arange(0, PAD_V)
    inside, at = rows < end, rows - first_k
    value = _tile(v + 2 * pair * D, start, v_row, end, e, BLOCK_K, 2 * D)
    out_v = tl.zeros((BLOCK_K, PAD_V), tl.float32)
    # The first query that sees the block's first key stands at its position, the last one `window` keys on.
    low = tl.maximum(start - first_k - ahead, first_q)
    high = tl.where(window > 0, tl.minimum(end - first_k - ahead + window - 1, last_q), last_q)
    high = tl.where(end > start, high, low)
    for stripe in range(0, 2):
        key = _tile(k + (2 * pair + stripe) * D, start, k_row, end, d, BLOCK_K, D)
        out_k = tl.zeros((BLOCK_K, PAD_D), tl.float32)
        for member in range(0, group):
            head = 2 * (pair * group + member) + stripe
            for line in range(low, high, BLOCK_Q):
                lines = line + tl.arange(0, BLOCK_Q)
                queries = _tile(q + head * D, line, q_row, high, d, BLOCK_Q, D)
                upstream = _tile(grad + head * 2 * D, line, heads * 2 * D, high, e, BLOCK_Q, 2 * D)
                place = tl.cast(lines, tl.int64) * heads + head
                norm = tl.load(lse + place, mask=lines < high, other=0.0) * LOG2E
                product = tl.load(inner + place, mask=lines < high, other=0.0)
                # Transposed, keys by queries: what stays the same in this loop is then divided among the warps.
                scores = tl.dot(key, tl.trans(queries), input_precision=PRECISION) * (scale * LOG2E)
                seen = _visible((lines + ahead)[None, :], at[:, None], window, keys) & (lines < high)[None, :]
                weights = tl.where(seen, tl.exp2(scores - norm[None, :]), 0.0)
                out_v += tl.dot(weights.to(upstream.dtype), upstream, input_precision=PRECISION)
                slope = tl.dot(value, tl.trans(upstream), input_precision=PRECISION) - product[None, :]
                out_k += tl.dot((weights * slope).to(queries.dtype), queries, input_precision=PRECISION)
        place = tl.cast(rows, tl.int64) * pairs * 2 + 2 * pair + stripe
        tl.store(
            grad_k + place[:, None] * D + d[None, :], (out_k * scale).to(grad_k.dtype.element_ty),
            mask=inside[:, None] & (d < D)[None, :],
        )  # fmt: skip
    place = (tl.cast(rows, tl.int64) * pairs + pair) * 2 * D
    tl.store(
        grad_v + place[:, None] + e[None, :], out_v.to(grad_v.dtype.element_ty),
        mask=inside[:, None] & (e < 2 * D)[None, :],
    )  # fmt: skip
