"""Causal depthwise convolution of packed documents in plain torch, without a loop over documents.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.

The row is widened: K-1 context rows (zeros, or the initial state) go before each document. Every tap is then one shift
of the whole row, a document's first tokens meet their own context, and its last K-1 rows are its final state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


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
    (total, channels), context = x.shape, weight.shape[1] - 1
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, total], device=x.device)
    borders = cu_seqlens.long()
    documents = borders.numel() - 1
    # Token t of document s moves to t + (s + 1) * context.
    index = torch.arange(total, device=x.device)
    document = torch.searchsorted(borders[1:], index, right=True)
    tokens = index + (document + 1) * context
    ends = borders[1:] + (torch.arange(documents, device=x.device) + 1) * context
    tails = (ends[:, None] + torch.arange(-context, 0, device=x.device)).reshape(-1)
    rows = x.new_zeros(total + documents * context, channels, dtype=work).index_copy(0, tokens, x.to(work))
    if initial_state is not None:
        heads = (borders[:-1] + torch.arange(documents, device=x.device) * context)[:, None]
        heads = (heads + torch.arange(context, device=x.device)).reshape(-1)
        before = initial_state.to(work).transpose(1, 2).reshape(documents * context, channels)
        rows = rows.index_copy(0, heads, before)
    taps = weight.to(work)
    span = max(0, rows.shape[0] - context)
    y = torch.zeros_like(rows[:span])
    for tap in range(context + 1):
        y = torch.addcmul(y, rows[tap : tap + span], taps[:, tap])
    # y[i] belongs to row i + context.
    y = y.index_select(0, tokens - context)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    final = rows.index_select(0, tails).view(documents, context, channels).transpose(1, 2)
    return y.to(x.dtype), final.to(x.dtype).contiguous()
