"""The backward pass of the convolution in plain torch; autograd doesn't record an op's inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import compute_dtype
from .inputs import ConvInputs
from .torch import _conv_layout


def causal_conv1d_torch_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ConvInputs
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, initial_state in the compute type; None for None."""
    x, weight, bias, activation, cu_seqlens, initial_state = inputs
    work, channels, context = compute_dtype(x), x.shape[1], weight.shape[1] - 1
    state_shape = (0 if initial_state is None else initial_state.shape[0], context, channels)
    tokens, heads, tails, length = _conv_layout(cu_seqlens, x.shape[0], context, x.device)
    rows = x.new_zeros(length, channels, dtype=work).index_copy(0, tokens, x.to(work))
    if initial_state is not None:
        rows = rows.index_copy(0, heads, initial_state.to(work).transpose(1, 2).reshape(-1, channels))
    taps, span = weight.to(work), max(0, length - context)
    g = x.new_zeros(x.shape, dtype=work) if grad_y is None else grad_y.to(work)
    if activation == "silu":
        y = torch.zeros_like(rows[:span])
        for tap in range(context + 1):
            y = torch.addcmul(y, rows[tap : tap + span], taps[:, tap])
        y = y.index_select(0, tokens - context)
        y = y if bias is None else y + bias.to(work)
        gate = torch.sigmoid(y)
        g = g * (gate * (1.0 + y * (1.0 - gate)))
    grad_rows = torch.zeros_like(rows)
    if grad_final is not None:
        grad_rows.index_add_(0, tails, grad_final.to(work).transpose(1, 2).reshape(-1, channels))
    spread = x.new_zeros(span, channels, dtype=work).index_copy(0, tokens - context, g)
    grad_weight = torch.zeros_like(taps)
    for tap in range(context + 1):
        grad_weight[:, tap] = (g * rows.index_select(0, tokens - context + tap)).sum(0)
        grad_rows[tap : tap + span].addcmul_(spread, taps[:, tap])
    return [
        grad_rows.index_select(0, tokens),
        grad_weight,
        None if bias is None else g.sum(0),
        None if initial_state is None else grad_rows.index_select(0, heads).view(state_shape).transpose(1, 2),
    ]
