"""Choosing a token of bfloat16 logits by Triton kernels: launches and what they hand on."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import launch
from .inputs import Choice

PIECE = 8192  # logits of a program
BINS = 8192  # kinds of logits at once


def choose_token_triton(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `choose_token`; logits in bfloat16."""
    from .triton_kernels import KINDS, count_kernel, pick_kernel, sum_pieces_kernel, threshold_kernel

    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    (rows, vocabulary), device = logits.shape, logits.device
    tokens, best = torch.empty(rows, dtype=torch.int64, device=device), logits.new_empty(rows)
    block, where = min(PIECE, power_of_two(vocabulary)), (vocabulary, logits.stride(0))
    pieces = -(-vocabulary // block)
    counts = torch.zeros(rows, KINDS.value, dtype=torch.int32, device=device)
    whole, real = (torch.empty(rows, n, dtype=t, device=device) for n, t in ((2, torch.int32), (4, torch.float32)))
    masses = torch.empty(rows, pieces, dtype=torch.float32, device=device)
    ties = torch.empty(rows, pieces, dtype=torch.int32, device=device)
    launch(count_kernel, (rows, pieces), logits, counts, *where, BLOCK=block, warps=8)
    launch(
        threshold_kernel, (rows,), counts, *(value.contiguous() for value in choice), whole, real, best, vocabulary,
        BINS=BINS, warps=16,
    )  # fmt: skip
    launch(sum_pieces_kernel, (rows, pieces), logits, whole, real, masses, ties, *where, BLOCK=block, warps=8)
    launch(
        pick_kernel, (rows,), logits, whole, real, masses, ties, tokens, pieces, *where, PIECES=power_of_two(pieces),
        BLOCK=block, warps=8,
    )  # fmt: skip
    return tokens, best
