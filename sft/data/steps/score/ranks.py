"""The ranks of given tokens under a language model's head, beside their log probabilities, without full logits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

VOCABULARY_BLOCK = 8192
TOKENS_AT_ONCE = 256


def logprobs_and_ranks(hidden: Tensor, weight: Tensor, targets: Tensor, max_rank: int) -> Tensor:
    """Natural log probability and rank of each target under the logits hidden @ weight.T.

    A token's rank is 1 + the number of tokens of the vocabulary whose logit is above its own, at most `max_rank`.

    Args:
        hidden: (n, H). weight: (V, H). targets: (n,) int64, each below V.
    Returns:
        (n, 2) float32 (float64 if an input is): log probability, rank. Logits in memory are 256 * 8,192 at most.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    picked = (hidden.to(wide) * weight[targets].to(wide)).sum(1, keepdim=True)
    top = torch.full_like(picked, float("-inf"))
    total, above = torch.zeros_like(picked), torch.zeros_like(picked)
    for start, block in vocabulary_blocks(weight, wide):
        for first in range(0, len(targets), TOKENS_AT_ONCE):
            chunk = slice(first, first + TOKENS_AT_ONCE)
            logits = wide_product(hidden[chunk], block, wide)
            # The target's own logit is no other's, however this product rounds it.
            own = targets[chunk] - start
            inside = ((own >= 0) & (own < len(block))).nonzero()[:, 0]
            logits[inside, own[inside]] = picked[chunk][inside, 0]
            # Summed as numbers: torch sums truth values ten times slower.
            above[chunk] += torch.gt(logits, picked[chunk], out=torch.empty_like(logits)).sum(1, keepdim=True)
            higher = torch.maximum(top[chunk], logits.amax(1, keepdim=True))
            total[chunk] *= (top[chunk] - higher).exp()
            top[chunk] = higher
            total[chunk] += logits.sub_(higher).exp_().sum(1, keepdim=True)
    return torch.cat([picked - top - total.log(), (above + 1).clamp(max=max_rank)], 1)


def vocabulary_blocks(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """First token and rows of each block of the vocabulary, widened but on a GPU, which sums wide by itself."""
    for start in range(0, len(weight), VOCABULARY_BLOCK):
        block = weight[start : start + VOCABULARY_BLOCK]
        yield start, block if weight.is_cuda else block.to(wide)


def wide_product(rows: Tensor, block: Tensor, wide: torch.dtype) -> Tensor:
    """rows @ block.T in the wide type."""
    if rows.is_cuda and rows.dtype == block.dtype != wide:
        return torch.mm(rows, block.T, out_dtype=wide)
    return rows.to(wide) @ block.to(wide).T
