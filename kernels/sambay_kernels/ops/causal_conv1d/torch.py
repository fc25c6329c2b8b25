"""Causal depthwise convolution of packed documents in plain torch, without a loop over documents.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.

The row is widened: K-1 context rows (zeros, or the initial state) go before each document. Every tap is then one shift
of the whole row, a document's first tokens meet their own context, and its last K-1 rows are its final state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def _conv_layout(
    cu_seqlens: Tensor | None, total: int, context: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows of the widened matrix: of each token (T,), of each document's context and of its last rows (S * context,);
    and how many rows there are."""
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, total], device=device)
    borders = cu_seqlens.long()
    documents = borders.numel() - 1
    index, before = torch.arange(total, device=device), torch.arange(documents, device=device) * context
    # Token t of document s moves to t + (s + 1) * context.
    tokens = index + (torch.searchsorted(borders[1:].contiguous(), index, right=True) + 1) * context
    span = torch.arange(context, device=device)
    heads = (borders[:-1] + before)[:, None] + span
    tails = (borders[1:] + before)[:, None] + span
    return tokens, heads.reshape(-1), tails.reshape(-1), total + documents * context


def causal_conv1d_torch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution, bias and activation; shapes and types as in `sambay_kernels.causal_conv1d`."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    channels, context = x.shape[1], weight.shape[1] - 1
    tokens, heads, tails, length = _conv_layout(cu_seqlens, x.shape[0], context, x.device)
    rows = x.new_zeros(length, channels, dtype=work).index_copy(0, tokens, x.to(work))
    if initial_state is not None:
        rows = rows.index_copy(0, heads, initial_state.to(work).transpose(1, 2).reshape(-1, channels))
    taps, span = weight.to(work), max(0, length - context)
    y = torch.zeros_like(rows[:span])
    for tap in range(context + 1):
        y = torch.addcmul(y, rows[tap : tap + span], taps[:, tap])
    # y[i] belongs to row i + context.
    y = y.index_select(0, tokens - context)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    documents = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    final = rows.index_select(0, tails).view(documents, context, channels)
    return y.to(x.dtype), final.to(x.dtype).transpose(1, 2).contiguous()


def causal_conv1d_step_torch(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = "silu",
    slots: Tensor | None = None,
) -> Tensor:
    """One token of each sequence; shapes as in `sambay_kernels.causal_conv1d_step`. Without gradients only."""
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    held, taps = state if slots is None else state[slots], weight.to(work)
    # Tap by tap: one pass over narrow matrices (d, K) takes longer than K passes over (d,).
    past = held.unbind(2)
    y = x.to(work) * taps[:, -1]
    for tap, values in enumerate(past):
        y = y.addcmul_(values.to(work), taps[:, tap])
    for older, newer in zip(past, (*past, x)[1:], strict=True):
        older.copy_(newer)
    if slots is not None:
        state[slots] = held
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype)
