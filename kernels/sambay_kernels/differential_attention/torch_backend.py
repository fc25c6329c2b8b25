"""Differential attention of packed documents in plain torch.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.

Heads are striped: query head 2j+a is stripe a of pair j, key and value heads likewise. Both stripes of a pair read both
value heads of their key pair side by side, so a pair of heads is two ordinary attention maps whose values are twice as
wide as their keys. Queries and keys are padded with zeros to the width of the values: fused attention kernels want one
width, the score product costs what two calls would, and every softmax is computed once.

On CPU every document is cut into pieces: runs of queries with the keys that they can see, aligned at their last one. No
piece holds two documents and no mask is larger than one piece, so memory is linear in the tokens, and a document's
result depends on nothing else in the row, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

DIFF_PIECE_ROWS = 128  # queries of a masked piece; small ones waste less of the triangle, large ones cost fewer calls
DIFF_CAUSAL_ROWS = 1024  # documents from here on go to the causal kernel whole: it skips what lies above the diagonal


class DiffPiece(NamedTuple):
    """`tiles` runs of `rows` queries from `query` on; run i sees the `columns` keys from `key + i * rows` on.

    causal: the piece is the plain triangle, which kernels know without a mask.
    """

    query: int
    key: int
    rows: int
    columns: int
    tiles: int = 1
    causal: bool = False


def diff_pieces(bounds_q: list[int], bounds_k: list[int], window: int) -> list[DiffPiece]:
    """Cut packed documents into pieces; query i of n stands at key n_keys - n + i (bottom-right). window 0 = none."""
    pieces: list[DiffPiece] = []
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        n, m = q1 - q0, k1 - k0
        reach = min(window, m) if window else m
        # Queries that still see the document's first key; the others have a full window before them.
        head = min(n, max(0, reach - (m - n)))
        rows = DIFF_PIECE_ROWS if head < DIFF_CAUSAL_ROWS or n < m else head
        for start in range(0, head, rows):
            stop = min(start + rows, head)
            columns = m - n + stop
            pieces.append(DiffPiece(q0 + start, k0, stop - start, columns, causal=stop - start == columns))
        if head < n:
            rows = min(max(32, window // 4), DIFF_PIECE_ROWS)
            key = k0 + (m - n) + head - window + 1
            full, rest = divmod(n - head, rows)
            if full:
                pieces.append(DiffPiece(q0 + head, key, rows, rows + window - 1, full))
            if rest:
                done = full * rows
                pieces.append(DiffPiece(q0 + head + done, key + done, rest, rest + window - 1))
    return pieces


def diff_mask(pieces: list[DiffPiece], window: int, like: Tensor) -> Tensor:
    """One additive mask whose bottom-right corner of (rows, columns) is the mask of any piece."""
    masked = [piece for piece in pieces if piece.rows > 1 and not piece.causal]
    rows = max((piece.rows for piece in masked), default=0)
    columns = max((piece.columns for piece in masked), default=0)
    # Distance of a query to a key behind it, negative when the key lies ahead.
    behind = torch.arange(rows, device=like.device)[:, None] - torch.arange(columns, device=like.device)
    behind += columns - rows
    hidden = behind < 0
    if window:
        hidden |= behind >= window
    dtype = torch.promote_types(like.dtype, torch.float32)
    return torch.zeros(rows, columns, dtype=dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def diff_pad_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ordinary attention heads of width 2d in q's order: (Tq, Hq, d), (Tk, Hkv, d) -> (Tq, Hq, 2d), (Tk, Hq, 2d)."""
    keys, heads_kv, d = k.shape
    pairs, group = heads_kv // 2, q.shape[1] // heads_kv
    k = F.pad(k, (0, d)).view(keys, pairs, 1, 2, 2 * d).expand(-1, -1, group, -1, -1)
    v = v.reshape(keys, pairs, 1, 2 * d).expand(-1, -1, 2 * group, -1)
    heads = (keys, q.shape[1], 2 * d)
    return F.pad(q, (0, d)).contiguous(), k.reshape(heads).contiguous(), v.reshape(heads).contiguous()


def diff_tiles(x: Tensor, start: int, rows: int, step: int, tiles: int) -> Tensor:
    """Tiles of a packed (T, H, D) tensor as a view (tiles, H, rows, D); tiles overlap where step < rows."""
    heads, width = x.shape[1:]
    strides = (step * heads * width, width, heads * width, 1)
    return x.as_strided((tiles, heads, rows, width), strides, x.storage_offset() + start * heads * width)


def diff_cpu_kernel(q: Tensor) -> bool:
    """Whether torch's CPU attention kernel takes q; it is called by name because its log-sum-exp is wanted."""
    return q.device.type == "cpu"


def diff_corner(piece: DiffPiece, mask: Tensor) -> Tensor | None:
    """The piece's own mask, or None where it needs none (the triangle, or a single query, which sees all its keys)."""
    if piece.causal or piece.rows == 1:
        return None
    return mask[mask.shape[0] - piece.rows :, mask.shape[1] - piece.columns :]


def diff_sdpa(
    q: Tensor, k: Tensor, v: Tensor, piece: DiffPiece, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of one piece, (tiles, H, rows, D), and on CPU the log-sum-exp (tiles, H, rows) its backward wants."""
    if diff_cpu_kernel(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=piece.causal, attn_mask=mask, scale=scale
        )
    bias = None if mask is None else mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=piece.causal, scale=scale)
    return out, out.new_zeros(out.shape[:-1])


def diff_sdpa_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    piece: DiffPiece,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, ...]:
    """Gradients of q, k, v of one piece; devices without the CPU kernel compute the piece once more."""
    if diff_cpu_kernel(q):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, piece.causal, attn_mask=mask, scale=scale
        )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        again, _ = diff_sdpa(leaves[0], leaves[1], leaves[2], piece, mask, scale)
    return torch.autograd.grad(again, leaves, grad)


def diff_maps(
    q: Tensor, k: Tensor, v: Tensor, bounds_q: list[int], bounds_k: list[int], window: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Both attention maps of every pair of heads, before their subtraction.

    Args:
        q: (Tq, Hq, d); k, v: (Tk, Hkv, d); bounds: document borders; window: 0 for none.

    Returns:
        maps (Tq, Hq, 2d) in q's type, log-sum-exp (Tq, Hq) in float32 (float64 for float64).
    """
    pieces = diff_pieces(bounds_q, bounds_k, window)
    mask = diff_mask(pieces, window, q)
    q, k, v = diff_pad_heads(q, k, v)
    maps = torch.empty_like(q)
    lse = torch.empty(*q.shape[:2], 1, dtype=mask.dtype, device=q.device)
    for piece in pieces:
        start, key, rows, columns, tiles, _ = piece
        queries = diff_tiles(q, start, rows, rows, tiles)
        keys, values = diff_tiles(k, key, columns, rows, tiles), diff_tiles(v, key, columns, rows, tiles)
        out, sums = diff_sdpa(queries, keys, values, piece, diff_corner(piece, mask), scale)
        diff_tiles(maps, start, rows, rows, tiles).copy_(out)
        diff_tiles(lse, start, rows, rows, tiles).copy_(sums[..., None])
    return maps, lse[..., 0]


def diff_add_tiles(total: Tensor, part: Tensor, start: int, step: int) -> None:
    """Add tiles (tiles, H, rows, D) that begin every `step` rows to a packed (T, H, D) tensor; tiles may overlap."""
    tiles, _, rows, _ = part.shape
    for begin in range(0, rows, step):
        width = min(step, rows - begin)
        diff_tiles(total, start + begin, width, step, tiles).add_(part[:, :, begin : begin + width])


def diff_maps_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    maps: Tensor,
    lse: Tensor,
    bounds_q: list[int],
    bounds_k: list[int],
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`diff_maps` to q, k and v, each in its input's type (summed in lse's)."""
    pieces = diff_pieces(bounds_q, bounds_k, window)
    mask = diff_mask(pieces, window, q)
    d, (keys, heads_kv, _) = q.shape[-1], k.shape
    wide_q, wide_k, wide_v = diff_pad_heads(q, k, v)
    grad, lse, grad_q = grad.contiguous(), lse[..., None].contiguous(), torch.empty_like(wide_q)
    grad_k, grad_v = (torch.zeros(wide_k.shape, dtype=lse.dtype, device=q.device) for _ in range(2))
    for piece in pieces:
        start, key, rows, columns, tiles, _ = piece
        own = [diff_tiles(x, start, rows, rows, tiles) for x in (grad, wide_q, maps, lse)]
        seen = [diff_tiles(x, key, columns, rows, tiles) for x in (wide_k, wide_v)]
        sums, corner = own[3][..., 0].contiguous(), diff_corner(piece, mask)
        found = diff_sdpa_backward(own[0], own[1], seen[0], seen[1], own[2], sums, piece, corner, scale)
        diff_tiles(grad_q, start, rows, rows, tiles).copy_(found[0])
        diff_add_tiles(grad_k, found[1], key, rows)
        diff_add_tiles(grad_v, found[2], key, rows)
    pairs = heads_kv // 2
    grad_k = grad_k[..., :d].reshape(keys, pairs, -1, 2, d).sum(2)
    grad_v = grad_v.view(keys, pairs, -1, 2 * d).sum(2)
    return grad_q[..., :d].contiguous(), grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype)


class DiffMaps(torch.autograd.Function):
    """:func:`diff_maps` with its backward, for use without torch.library."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *plan: Any) -> Tensor:
        maps, lse = diff_maps(q, k, v, *plan)
        ctx.save_for_backward(q, k, v, maps, lse)
        ctx.plan = plan
        return maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*diff_maps_backward(grad, *ctx.saved_tensors, *ctx.plan), None, None, None, None)


@lru_cache(maxsize=1)
def diff_flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's packed attention where that package is installed, else None (torch brings the same kernel)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def diff_maps_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    lengths: tuple[int, int],
    window: int,
    scale: float,
) -> Tensor:
    """:func:`diff_maps` in one FlashAttention call on CUDA in half precision; lengths: longest documents of q and k.

    FlashAttention gives query head h the key head h // group, so the stripes of a group are brought side by side first.
    """
    tokens, heads_q, d = q.shape
    keys, heads_kv, _ = k.shape
    pairs, group = heads_kv // 2, heads_q // heads_kv
    q = F.pad(q.view(tokens, pairs, group, 2, d).transpose(2, 3).reshape(tokens, heads_q, d), (0, d))
    k = F.pad(k, (0, d))
    v = v.reshape(keys, pairs, 1, 2 * d).expand(-1, -1, 2, -1).reshape(keys, heads_kv, 2 * d)
    limits = (window - 1 if window else -1, 0)
    flash = diff_flash_attn()
    if flash is not None:
        out = flash(q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, softmax_scale=scale, causal=True, window_size=limits)
    else:
        from torch.nn.attention.varlen import varlen_attn

        out = varlen_attn(  # type: ignore[assignment]
            q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, scale=scale, window_size=limits, enable_gqa=group > 1
        )
    return out.view(tokens, pairs, 2, group, 2 * d).transpose(2, 3).reshape(tokens, heads_q, 2 * d)


def diff_combine(maps: Tensor, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float) -> Tensor:
    """Subtract the maps of a pair, RMS-normalise over its 2d outputs, scale: (..., Hq, 2d) -> (..., Hq*d)."""
    wide = torch.promote_types(maps.dtype, torch.float32)
    first, second = maps.unflatten(-2, (-1, 2)).to(wide).unbind(-2)
    out = first - lambda_full.to(wide) * second
    out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + eps)
    return (out * (subln_weight.to(wide) * (1.0 - lambda_init))).to(maps.dtype).flatten(-2)


def differential_attention_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Tensor:
    """Causal differential attention of packed documents, as in `sambay_kernels.differential_attention`."""
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.is_cuda and q.dtype in (torch.bfloat16, torch.float16):
        if max_length_q is None or max_length_k is None:
            max_length_q, max_length_k = (int(c.diff().max()) for c in (cu_seqlens_q, cu_seqlens_k))
        lengths = (max_length_q, max_length_k)
        maps = diff_maps_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, lengths, window or 0, scale)
    else:
        maps = DiffMaps.apply(q, k, v, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), window or 0, scale)
    return diff_combine(maps, lambda_full, subln_weight, lambda_init, eps)


def differential_attention_step_torch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """One new token of each sequence, as in `sambay_kernels.differential_attention_step`."""
    batch, heads_q, d = q.shape
    pairs, keys = k.shape[1] // 2, k.shape[2]
    scale = d**-0.5 if scale is None else scale
    # Queries of one key head side by side, so that no key is repeated in memory.
    q = (q * scale).view(batch, pairs, -1, 2, d).transpose(2, 3)
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = torch.matmul(q, k.reshape(batch, pairs, 2, keys, d).transpose(-1, -2)).to(wide)
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None, :], torch.finfo(wide).min)
    weights = scores.softmax(-1).to(v.dtype).view(batch, pairs, 1, -1, keys)
    maps = torch.matmul(weights, v.reshape(batch, pairs, 2, keys, d))
    # (B, pairs, value half, stripe, group, d) -> (B, pairs, group, stripe, value half, d)
    maps = maps.view(batch, pairs, 2, 2, -1, d).permute(0, 1, 4, 3, 2, 5).reshape(batch, heads_q, 2 * d)
    return diff_combine(maps, lambda_full, subln_weight, lambda_init, eps)
