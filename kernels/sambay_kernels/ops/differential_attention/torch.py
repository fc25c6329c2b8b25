"""Differential attention of packed documents in plain torch.

The file imports torch and `inputs` alone and keeps its names to itself, so that it can travel inside an exported model.

Heads are striped: query head 2j+a is stripe a of pair j, key and value heads likewise. Both stripes of a pair read both
value heads of their key pair side by side, so a pair of heads is two ordinary attention maps whose values are twice as
wide as their keys. Fused kernels want one width: FlashAttention gets queries and keys padded with zeros, in one call.

Elsewhere every document is cut into pieces: runs of queries with the keys that they can see, aligned at their last one.
A piece is a few products of matrices, with wide values and shared key heads as they are; on CPU that is as fast as
torch's fused attention on padded heads, and faster where heads are many or wide. No piece holds two documents, so a
document's result depends on nothing else in the row, to the last bit. The scores of a piece are bounded by the keys it
sees, so memory is linear in the tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import DiffInputs

DIFF_ROWS = 128  # queries of a piece: fewer waste less of the triangle, more make larger products
DIFF_SCORES = 1 << 21  # scores made at once, unless a single pair of heads of a piece has more


class DiffPiece(NamedTuple):
    """`tiles` runs of `rows` queries from `query` on; run i sees the `columns` keys from `key + i * rows` on."""

    query: int
    key: int
    rows: int
    columns: int
    tiles: int


def diff_pieces(inputs: DiffInputs) -> list[DiffPiece]:
    """Cut packed documents into pieces; query i of n stands at key n_keys - n + i (bottom-right)."""
    pieces: list[DiffPiece] = []
    bounds_q, bounds_k = inputs.cu_seqlens_q.tolist(), inputs.cu_seqlens_k.tolist()
    window, heads = inputs.window, inputs.q.shape[1]
    tile = min(max(32, window // 4), DIFF_ROWS)
    together = max(1, DIFF_SCORES // (heads * tile * (tile + window)))
    for q0, q1, k0, k1 in zip(bounds_q[:-1], bounds_q[1:], bounds_k[:-1], bounds_k[1:], strict=True):
        n, m = q1 - q0, k1 - k0
        reach = min(window, m) if window else m
        # Queries that still see the document's first key; the others have a full window before them.
        head = min(n, max(0, reach - (m - n)))
        for start in range(0, head, DIFF_ROWS):
            stop = min(start + DIFF_ROWS, head)
            pieces.append(DiffPiece(q0 + start, k0, stop - start, m - n + stop, 1))
        done, offset = head, k0 - q0 + (m - n) - window + 1
        while done < n:
            rows = min(tile, n - done)
            tiles = min(together, (n - done) // rows)
            pieces.append(DiffPiece(q0 + done, q0 + done + offset, rows, rows + window - 1, tiles))
            done += tiles * rows
    return pieces


def diff_mask(pieces: list[DiffPiece], window: int, like: Tensor) -> Tensor:
    """One additive mask whose bottom-right corner of (rows, columns) is the mask of any piece."""
    rows = max((piece.rows for piece in pieces), default=0)
    columns = max((piece.columns for piece in pieces), default=0)
    # Distance of a query to a key behind it, negative when the key lies ahead.
    behind = torch.arange(rows, device=like.device)[:, None] - torch.arange(columns, device=like.device)
    behind += columns - rows
    hidden = behind < 0
    if window:
        hidden |= behind >= window
    return torch.zeros(rows, columns, dtype=like.dtype, device=like.device).masked_fill_(hidden, float("-inf"))


def diff_tiles(x: Tensor, start: int, rows: int, step: int, tiles: int) -> Tensor:
    """Runs of `rows` along the first dimension of x (T, ...), one every `step`, as a view (tiles, rows, ...)."""
    strides = (step * x.stride(0), *x.stride())
    return x.as_strided((tiles, rows, *x.shape[1:]), strides, x.storage_offset() + start * x.stride(0))


def diff_add_tiles(total: Tensor, part: Tensor, start: int, step: int) -> None:
    """Add runs (tiles, rows, ...) that begin every `step` rows to total (T, ...); runs may overlap."""
    tiles, rows = part.shape[:2]
    for begin in range(0, rows, step):
        width = min(step, rows - begin)
        diff_tiles(total, start + begin, width, step, tiles).add_(part[:, begin : begin + width])


def diff_queries(x: Tensor, piece: DiffPiece) -> Tensor:
    """A piece of a tensor by query, (Tq, pairs, group, 2, width), as a view (tiles, pairs, 2, group, rows, width)."""
    return diff_tiles(x, piece.query, piece.rows, piece.rows, piece.tiles).permute(0, 2, 4, 3, 1, 5)


def diff_keys(x: Tensor, piece: DiffPiece) -> Tensor:
    """A piece of a tensor by key, (Tk, heads, width), as (tiles * heads, columns, width); a view for a single tile."""
    return diff_tiles(x, piece.key, piece.columns, piece.rows, piece.tiles).transpose(1, 2).flatten(0, 1)


def diff_split(
    q: Tensor, k: Tensor, v: Tensor, scale: float, pieces: list[DiffPiece]
) -> Iterator[tuple[DiffPiece, slice, Tensor, Tensor, Tensor]]:
    """Every piece, with as many pairs of heads as fit in DIFF_SCORES: the pairs, scaled queries, keys and values.

    q: (Tq, pairs, group, 2, d); k: (Tk, pairs, 2, d); v: (Tk, pairs, 2d), as the products want them:
    queries (tiles*pairs*2, group*rows, d), keys (tiles*pairs*2, columns, d), values (tiles*pairs, columns, 2d).
    """
    for piece in pieces:
        scores = piece.tiles * q.shape[2] * 2 * piece.rows * piece.columns
        step = max(1, DIFF_SCORES // scores)
        for first in range(0, q.shape[1], step):
            pairs = slice(first, min(first + step, q.shape[1]))
            queries = diff_queries(q[:, pairs], piece).mul(scale).flatten(3, 4).flatten(0, 2)
            yield piece, pairs, queries, diff_keys(k[:, pairs].flatten(1, 2), piece), diff_keys(v[:, pairs], piece)


def diff_scores(queries: Tensor, keys: Tensor, piece: DiffPiece, mask: Tensor) -> Tensor:
    """Masked scores of a piece: (tiles*pairs*2, group*rows, columns)."""
    scores = torch.bmm(queries, keys.transpose(1, 2))
    if piece.rows > 1:
        corner = mask[mask.shape[0] - piece.rows :, mask.shape[1] - piece.columns :]
        scores.view(-1, piece.rows, piece.columns).add_(corner)
    return scores


def diff_views(inputs: DiffInputs) -> tuple[Tensor, Tensor, Tensor]:
    """q (Tq, pairs, group, 2, d), k (Tk, pairs, 2, d), v (Tk, pairs, 2d) in the type of the sums, contiguous."""
    wide = torch.promote_types(inputs.q.dtype, torch.float32)
    q, k, v = (x.to(wide).contiguous() for x in inputs[:3])
    (tokens, heads, d), (keys, heads_kv, _) = q.shape, k.shape
    pairs = heads_kv // 2
    return (
        q.view(tokens, pairs, heads // heads_kv, 2, d),
        k.view(keys, pairs, 2, d),
        v.view(keys, pairs, 2 * d),
    )


def diff_maps(inputs: DiffInputs) -> tuple[Tensor, Tensor]:
    """Both attention maps of every pair of heads, before their subtraction.

    Returns:
        maps (Tq, Hq, 2d) in q's type, log-sum-exp (Tq, Hq) in float32 (float64 for float64).
    """
    (tokens, heads, d), dtype = inputs.q.shape, inputs.q.dtype
    with torch.autocast(inputs.q.device.type, enabled=False):
        pieces = diff_pieces(inputs)
        q, k, v = diff_views(inputs)
        mask = diff_mask(pieces, inputs.window, q)
        maps, lse = q.new_empty(*q.shape[:-1], 2 * d, dtype=dtype), q.new_empty(*q.shape[:-1], 1)
        for piece, pairs, queries, keys, values in diff_split(q, k, v, inputs.scale, pieces):
            weights = diff_scores(queries, keys, piece, mask)
            top = weights.amax(-1, keepdim=True)
            total = weights.sub_(top).exp_().sum(-1, keepdim=True)
            out = torch.bmm(weights.view(values.shape[0], -1, piece.columns), values)
            place = diff_queries(maps[:, pairs], piece)
            place.copy_(out.div_(total.view(values.shape[0], -1, 1)).view(place.shape))
            sums = diff_queries(lse[:, pairs], piece)
            sums.copy_(total.log_().add_(top).view(sums.shape))
        return maps.view(tokens, heads, 2 * d), lse.view(tokens, heads)


def diff_maps_backward(grad: Tensor, inputs: DiffInputs, maps: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`diff_maps` to q, k and v, each in its input's type (summed in lse's)."""
    q, k, v, scale = *inputs[:3], inputs.scale
    with torch.autocast(q.device.type, enabled=False):
        pieces = diff_pieces(inputs)
        wide_q, wide_k, wide_v = diff_views(inputs)
        mask = diff_mask(pieces, inputs.window, wide_q)
        rows = wide_q.shape[:-1]
        grad = grad.to(lse.dtype).contiguous().view(*rows, 2 * q.shape[-1])
        dot = (grad * maps.view(grad.shape)).sum(-1, keepdim=True)
        lse = lse.contiguous().view(*rows, 1)
        grad_q, grad_k, grad_v = torch.empty_like(wide_q), torch.zeros_like(wide_k), torch.zeros_like(wide_v)
        for piece, pairs, queries, keys, values in diff_split(wide_q, wide_k, wide_v, scale, pieces):
            flat = (keys.shape[0], -1, 1)
            sums, inner = (diff_queries(x[:, pairs], piece).reshape(flat) for x in (lse, dot))
            weights = diff_scores(queries, keys, piece, mask).sub_(sums).exp_()
            out = diff_queries(grad[:, pairs], piece).reshape(values.shape[0], -1, values.shape[2])
            both = weights.view(values.shape[0], -1, piece.columns)
            part_v = torch.bmm(both.transpose(1, 2), out)
            slope = torch.bmm(out, values.transpose(1, 2)).view(weights.shape).sub_(inner).mul_(weights)
            place = diff_queries(grad_q[:, pairs], piece)
            place.copy_(torch.bmm(slope, keys).mul_(scale).view(place.shape))
            for total, part in ((grad_k, torch.bmm(slope.transpose(1, 2), queries)), (grad_v, part_v)):
                run = part.view(piece.tiles, -1, *part.shape[1:]).transpose(1, 2)
                diff_add_tiles(total[:, pairs].flatten(1, -2), run, piece.key, piece.rows)
        return grad_q.view(q.shape).to(q.dtype), grad_k.view(k.shape).to(k.dtype), grad_v.view(v.shape).to(v.dtype)


class DiffMaps(torch.autograd.Function):
    """:func:`diff_maps` with its backward, for use without torch.library."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *plan: Any) -> Tensor:
        maps, lse = diff_maps(DiffInputs(q, k, v, *plan))
        ctx.save_for_backward(q, k, v, *plan[:2], maps, lse)
        ctx.plan = plan[2:]
        return maps

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, maps, lse = ctx.saved_tensors
        return (*diff_maps_backward(grad, DiffInputs(*tensors, *ctx.plan), maps, lse), None, None, None, None)


@functools.lru_cache(maxsize=1)
def diff_flash_attn() -> Callable[..., Tensor] | None:
    """flash-attn's packed attention where that package is installed, else None (torch brings the same kernel)."""
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    return flash_attn_varlen_func


def diff_takes_flash(q: Tensor) -> bool:
    """Whether the maps are FlashAttention's."""
    return q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)


def diff_lengths(inputs: DiffInputs, max_length_q: int | None, max_length_k: int | None) -> tuple[int, int]:
    """The longest documents among queries and keys; where they aren't given the host has to wait."""
    if max_length_q is None or max_length_k is None:
        max_length_q, max_length_k = (int(c.diff().max()) for c in (inputs.cu_seqlens_q, inputs.cu_seqlens_k))
    return max_length_q, max_length_k


@contextmanager
def diff_deterministic() -> Iterator[None]:
    """torch's switch for algorithms that give the same bits every time, on for the calls inside."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def diff_flash(inputs: DiffInputs, lengths: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The FlashAttention that torch brings, for heads of one width: output (Tq, Hq, d), log-sum-exp (Hq, Tq)."""
    q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale = inputs
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, 0.0, not window, False, scale=scale,
        window_size_left=window - 1, window_size_right=0,
    )  # fmt: skip
    return out, lse


def diff_flash_backward(
    grad: Tensor, inputs: DiffInputs, lengths: tuple[int, int], out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`diff_flash` to q, k and v, the same bits every time.

    As it comes, FlashAttention's backward adds up q's gradient in the order in which its blocks end. torch's public
    varlen_attn has no argument against it; the kernel asks the process-wide switch, which is on for this call alone.
    It then takes a float32 copy of q's gradient for each of (multiprocessors / (documents * heads)) runs, rounded up.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale = inputs
    state = torch.zeros(2, dtype=torch.uint64, device=q.device)  # of dropout, which there is none of
    with diff_deterministic():
        return torch.ops.aten._flash_attention_backward(
            grad, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *lengths, 0.0, not window, state, q.new_empty(0),
            scale=scale, window_size_left=window - 1, window_size_right=0,
        )  # fmt: skip


class DiffFlash(torch.autograd.Function):
    """:func:`diff_flash` with its backward, for use without torch.library; arguments: inputs, then lengths."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        inputs, ctx.lengths = DiffInputs(*args[:7]), args[7:]
        out, lse = diff_flash(inputs, ctx.lengths)
        ctx.save_for_backward(*inputs[:5], out, lse)
        ctx.plan = inputs[5:]
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        found = diff_flash_backward(grad, DiffInputs(*tensors, *ctx.plan), ctx.lengths, out, lse)
        return (*found, *[None] * 6)


def diff_maps_varlen(
    inputs: DiffInputs, lengths: tuple[int, int], flash: Callable[..., Tensor] = DiffFlash.apply
) -> Tensor:
    """:func:`diff_maps` in one FlashAttention call on CUDA in half precision, deterministic in both directions.

    FlashAttention gives query head h the key head h // group, so the stripes of a group are brought side by side first.

    Args:
        lengths: the longest documents among queries and keys.
        flash: torch's FlashAttention, as DiffFlash; used where the package flash-attn isn't installed.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale = inputs
    tokens, heads_q, d = q.shape
    keys, heads_kv, _ = k.shape
    pairs, group = heads_kv // 2, heads_q // heads_kv
    q = F.pad(q.view(tokens, pairs, group, 2, d).transpose(2, 3).reshape(tokens, heads_q, d), (0, d))
    k = F.pad(k, (0, d))
    v = v.reshape(keys, pairs, 1, 2 * d).expand(-1, -1, 2, -1).reshape(keys, heads_kv, 2 * d)
    package = diff_flash_attn()
    if package is None:
        out = flash(q, k, v, *inputs[3:], *lengths)
    else:
        out = package(
            q, k, v, cu_seqlens_q, cu_seqlens_k, *lengths, softmax_scale=scale, causal=True,
            window_size=(window - 1, 0), deterministic=True,
        )  # fmt: skip
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
    inputs = DiffInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, window or 0, scale)
    if diff_takes_flash(q):
        maps = diff_maps_varlen(inputs, diff_lengths(inputs, max_length_q, max_length_k))
    else:
        maps = DiffMaps.apply(*inputs)
    return diff_combine(maps, lambda_full, subln_weight, lambda_init, eps)


def diff_maps_step(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """Both maps of a step, (B, Hq, 2d). q: (B, pairs, group, 2, d); k, v: (B, pairs, 2, Tk, d); key_mask: (B, Tk)."""
    # Queries of one key head side by side, so that no key is repeated in memory.
    scores = torch.matmul((q * scale).transpose(2, 3), k.transpose(-1, -2))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask[:, None, None, None, :], torch.finfo(scores.dtype).min)
    maps = torch.matmul(scores.softmax(-1).flatten(2, 3).unsqueeze(2), v).unflatten(3, (2, -1))
    # (B, pairs, value half, stripe, group, d) -> (B, pairs, group, stripe, value half, d)
    return maps.permute(0, 1, 4, 3, 2, 5).flatten(4).flatten(1, 3)


def diff_maps_step_half(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> Tensor:
    """The same for half precision, by fused attention: it sums in float32 and reads the cache as it is stored.

    A matrix product would round the scores, or need the whole cache in float32. It wants keys and values of one width,
    so each stripe meets each half of the values.
    """
    mask = None
    if key_mask is not None:
        # Not -inf: a sequence that sees nothing (an idle slot) has a mean then, and no NaN.
        mask = q.new_zeros(key_mask.shape).masked_fill_(~key_mask, torch.finfo(q.dtype).min)[:, None, None]
    attend = functools.partial(F.scaled_dot_product_attention, attn_mask=mask, scale=scale)
    halves = [[attend(q[..., a, :], k[:, :, a], v[:, :, half]) for half in (0, 1)] for a in (0, 1)]
    return torch.stack([torch.cat(pair, -1) for pair in halves], 3).flatten(1, 3)


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
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    form = diff_maps_step_half if q.dtype in (torch.bfloat16, torch.float16) else diff_maps_step
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.unflatten(1, (-1, 2)), v.unflatten(1, (-1, 2))
        maps = form(q.unflatten(1, (k.shape[1], -1, 2)), k, v, key_mask, scale)
        return diff_combine(maps, lambda_full, subln_weight, lambda_init, eps)
