"""Choosing a token by one Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import launch
from .inputs import Choice

BLOCK = 16384  # logits of a row at once: fastest of those tried on an H200


def choose_token_triton(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `choose_token`."""
    from .triton_kernels import choose_kernel

    rows, vocabulary = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    best = logits.new_empty(rows)
    shift = 16 if logits.dtype == torch.bfloat16 else 0
    launch(
        choose_kernel, (rows,), logits, *(value.contiguous() for value in choice), tokens, best, vocabulary,
        logits.stride(0), BLOCK=min(BLOCK, power_of_two(vocabulary)),
        SHIFT=shift, LOWEST=-(1 << (31 - shift)), warps=16,
    )  # fmt: skip
    return tokens, best
