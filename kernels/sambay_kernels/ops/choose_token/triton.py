"""Choosing a token by one Triton kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import launch
from .inputs import Choice

BLOCK = 8192  # logits of a row at once: of float32, twice as many need more registers than there are
PIECE = 8192  # logits of a program where many share a row
BINS = 8192  # kinds of logits at once


def choose_token_triton(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `choose_token`."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    choice = Choice(*(value.contiguous() for value in choice))
    tokens = torch.empty(logits.shape[0], dtype=torch.int64, device=logits.device)
    best = logits.new_empty(logits.shape[0])
    by = _by_counts if logits.dtype == torch.bfloat16 else _by_halves
    by(logits, choice, tokens, best)
    return tokens, best


def _by_halves(logits: Tensor, choice: Choice, tokens: Tensor, best: Tensor) -> None:
    from .triton_kernels import choose_kernel

    rows, vocabulary = logits.shape
    launch(
        choose_kernel, (rows,), logits, *choice, tokens, best, vocabulary, logits.stride(0),
        BLOCK=min(BLOCK, power_of_two(vocabulary)), SHIFT=0, LOWEST=-(1 << 31), warps=16,
    )  # fmt: skip


def _by_counts(logits: Tensor, choice: Choice, tokens: Tensor, best: Tensor) -> None:
    from .triton_counts import KINDS, count_kernel, pick_kernel, sum_pieces_kernel, threshold_kernel

    (rows, vocabulary), device = logits.shape, logits.device
    block, where = min(PIECE, power_of_two(vocabulary)), (vocabulary, logits.stride(0))
    pieces = -(-vocabulary // block)
    counts = torch.zeros(rows, KINDS.value, dtype=torch.int32, device=device)
    whole, real = (torch.empty(rows, n, dtype=t, device=device) for n, t in ((2, torch.int32), (4, torch.float32)))
    masses = torch.empty(rows, pieces, dtype=torch.float32, device=device)
    ties = torch.empty(rows, pieces, dtype=torch.int32, device=device)
    launch(count_kernel, (rows, pieces), logits, counts, *where, BLOCK=block, warps=8)
    launch(threshold_kernel, (rows,), counts, *choice, whole, real, best, vocabulary, BINS=BINS, warps=16)
    launch(sum_pieces_kernel, (rows, pieces), logits, whole, real, masses, ties, *where, BLOCK=block, warps=8)
    launch(
        pick_kernel, (rows,), logits, whole, real, masses, ties, tokens, pieces, *where, PIECES=power_of_two(pieces),
        BLOCK=block, warps=8,
    )  # fmt: skip
