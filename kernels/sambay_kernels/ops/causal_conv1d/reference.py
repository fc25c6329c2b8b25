"""Causal depthwise convolution written as its definition, token by token. The oracle of every other backend."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from .inputs import ConvInputs


def causal_conv1d_reference(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}), inside each document. Shapes as in `causal_conv1d`.

    Arithmetic in float64 when x is float64, else in float32. Differentiable, any order.
    """
    x, weight, bias, activation, cu_seqlens, initial_state = inputs
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    total, channels = x.shape
    width = weight.shape[1]
    taps = weight.to(work)
    borders = [0, total] if cu_seqlens is None else cu_seqlens.tolist()
    outputs: list[Tensor] = []
    finals: list[Tensor] = []
    for document, (start, end) in enumerate(itertools.pairwise(borders)):
        if initial_state is None:
            before = x.new_zeros(width - 1, channels, dtype=work)
        else:
            before = initial_state[document].to(work).t()
        rows = torch.cat([before, x[start:end].to(work)]).unbind(0)
        for t in range(end - start):
            outputs.append(sum((taps[:, k] * rows[t + k] for k in range(width)), torch.zeros_like(rows[0])))
        last = rows[len(rows) - width + 1 :]
        finals.append(torch.stack(last, 1) if last else x.new_zeros(channels, 0, dtype=work))
    y = torch.stack(outputs) if outputs else x.to(work) * 0
    final = torch.stack(finals) if finals else x.new_zeros(0, channels, width - 1, dtype=work)
    if bias is not None:
        y = y + bias.to(work)
    if activation == "silu":
        y = F.silu(y)
    return y.to(x.dtype), final.to(x.dtype)
