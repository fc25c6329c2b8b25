"""The likeliest tokens under a language model's head, without full logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sft.data.read.record import TopLogprobs
from sft.data.steps.score.ranks import TOKENS_AT_ONCE, vocabulary_blocks, wide_product
from sft.data.steps.score.token_scores import Document, TokenScorer
from sft.data.steps.top_logprobs.given import stored

_NONE = float("-inf")


def likeliest(hidden: Tensor, weight: Tensor, named: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens under the logits hidden @ weight.T, and their natural log probabilities.

    Args:
        hidden: (n, H). weight: (V, H). named: (V,) bool, the tokens that may be named; the others keep their mass.
    Returns:
        ids (n, k) int64, the likeliest first, -1 where there are fewer that may be named; log probabilities (n, k)
        float32 (float64 if an input is), 0 there. Logits in memory are 256 * 8,192 at most.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    best = torch.full((len(hidden), k), _NONE, dtype=wide, device=hidden.device)
    ids = torch.full(best.shape, -1, device=hidden.device)
    total = torch.full_like(best[:, :1], _NONE)
    for start, block in vocabulary_blocks(weight, wide):
        unnamed = ~named[start : start + len(block)]
        for first in range(0, len(hidden), TOKENS_AT_ONCE):
            chunk = slice(first, first + TOKENS_AT_ONCE)
            logits = wide_product(hidden[chunk], block, wide)
            total[chunk] = torch.logaddexp(total[chunk], logits.logsumexp(1, keepdim=True))
            values, places = logits.masked_fill_(unnamed, _NONE).topk(min(k, len(block)))
            best[chunk], chosen = torch.cat([best[chunk], values], 1).topk(k)
            ids[chunk] = torch.cat([ids[chunk], places + start], 1).gather(1, chosen)
    absent = best == _NONE
    return ids.masked_fill_(absent, -1), (best - total).masked_fill_(absent, 0)


class LikeliestTokens(TokenScorer):
    """What a model finds likeliest in the place of each scored token, of the tokens that may be named (V,) bool."""

    def __init__(self, model: Any, batch_tokens: int, k: int, named: NDArray[np.bool_]) -> None:
        """Raises UserError for a model whose logits aren't its hidden states times its head's weight."""
        super().__init__(model, batch_tokens)
        self.k, self.columns = k, (2 * k,)
        self._named = torch.from_numpy(named).to(model.get_output_embeddings().weight.device)

    def top(self, documents: Sequence[Document]) -> list[TopLogprobs]:
        """Of each document's scored tokens, in order; raises as scoring does."""
        return [stored(found[:, : self.k].astype(np.int32), found[:, self.k :]) for found in self(documents)]

    def _scores(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(n, 2k): ids, which a float32 holds exactly up to 2^24, and log probabilities."""
        ids, logprobs = likeliest(hidden, self.model.get_output_embeddings().weight, self._named, self.k)
        return torch.cat([ids.to(logprobs.dtype), logprobs], 1)
