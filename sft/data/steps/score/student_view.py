"""What an answer is worth to this very student, by its own probabilities: rank over surprisal, local naturalness."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.steps.score.divergence import rounded
from sft.data.steps.score.token_scores import Document
from sft.data.text.sentences import sentence_spans

_LEAST_SURPRISAL = 1e-12  # of an answer that the student knows by heart


def rank_surprisal(logprobs: NDArray[np.float64], ranks: NDArray[np.float64]) -> dict[str, Any]:
    """Rank-surprisal ratio of an answer (arXiv 2601.14249): low where its tokens are unlikely and yet ranked high.

    RSR = sum_t min(rank_t, r) / sum_t -log p_t, over the answer's tokens: the ratio of their mean clipped rank to their
    mean surprisal in nats. rank_t = 1 + the number of tokens whose probability is above the token's. The paper takes
    the answer with the lowest ratio, with r = 100.

    Args:
        logprobs: (n,), n at least 1. ranks: (n,), clipped at r.
    Returns:
        `rank_surprisal` and `mean_rank`.
    """
    ratio = ranks.sum() / max(-logprobs.sum(), _LEAST_SURPRISAL)
    return {"rank_surprisal": rounded(ratio), "mean_rank": rounded(ranks.mean())}


def local_windows(
    text: str, ids: NDArray[np.int32], starts: NDArray[np.int64], context: int, every: int
) -> list[Document]:
    """The sentences of an answer, each a document of its own with the few before it, of which it alone is scored.

    The answer's tokens (of one tokenisation, that of the whole conversation) belong to the sentence in which their
    first character lies that is no space; sentences without a token count for nothing. The window of sentence i is the
    tokens of sentences max(0, i - context) .. i: neither the problem nor anything before is read. The first sentence
    has nothing before it and is context only.

    A mask in the whole conversation's forward pass couldn't do this: a state space model's state holds all that was.

    Args:
        text: the answer. ids: (n,), its tokens. starts: (n,), their characters, ascending.
        context: sentences before. every: 1 scores each sentence, k each k-th: i = (k + 1) // 2 (the last sentence where
            there are fewer), then k further on.
    """
    ends = np.array([end for _, end in sentence_spans(text)], np.int64)
    sentence = np.searchsorted(ends, starts, side="right")
    borders = np.append(np.flatnonzero(np.diff(sentence, prepend=-1)), len(ids))
    windows = []
    count = len(borders) - 1
    for number in range(max(1, min((every + 1) // 2, count - 1)), count, every):
        first, begin, end = (int(borders[at]) for at in (max(0, number - context), number, number + 1))
        windows.append(Document(ids[first:end], np.arange(first, end) >= begin))
    return windows


def local_naturalness(windows: Sequence[NDArray[np.float64]]) -> dict[str, Any]:
    """How likely the student finds each sentence after the few before it alone (arXiv 2510.03988); higher is better.

    (1/m) sum_i (1/|s_i|) sum_{t in s_i} log p(t | its window up to t), over the m sentences that `local_windows` gives.
    That stays comparable where answers come from several teachers and are long, which the likelihood given all that
    came before does not. How long the window is to be is the user's choice (`context`).

    Returns:
        `local_naturalness`, None where no sentence has one before it; `local_sentences`, how many were scored.
    """
    mean = rounded(np.mean([scores.mean() for scores in windows])) if windows else None
    return {"local_naturalness": mean, "local_sentences": len(windows)}
