"""Decoding steps of a small SambaY against their definition in float64."""

from __future__ import annotations

import copy

import torch
from sambay_kernels import DecoderWeights, Slots
from torch import Tensor

from sft.models import Phi4FlashForCausalLM
from sft.models.sambay_decoding import decoder_weights

PAGE = 8


def weights_of(model: Phi4FlashForCausalLM) -> DecoderWeights:
    weights = decoder_weights(model)
    assert weights is not None
    return weights


def slots_of(weights: DecoderWeights, count: int = 4, longest: int = 320) -> Slots:
    """Slots whose pages are dealt out in turn, so that no sequence's pages lie side by side."""
    each = -(-longest // PAGE)
    slots = Slots(weights, slots=count, pages=count * each, page_size=PAGE, longest=longest, dtype=weights.embed.dtype)
    slots.table.copy_(torch.arange(count * each).view(each, count).T)
    return slots


def walk(count: int, steps: int, vocabulary: int = 96) -> list[tuple[Tensor, Tensor]]:
    """Tokens and slots of many steps: now all sequences, now some, in any order."""
    generator = torch.Generator().manual_seed(0)
    taken = []
    for step in range(steps):
        rows = torch.randperm(count, generator=generator)[: count - step % 2]
        taken.append((torch.randint(1, vocabulary, (len(rows),), generator=generator), rows))
    return taken


def in_float64(model: Phi4FlashForCausalLM) -> Phi4FlashForCausalLM:
    return copy.deepcopy(model).double()
