"""How the next token is chosen: greedy, or by temperature and nucleus, reproducibly for each request."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sft.utils.errors import UserError

# Among so many likeliest tokens a nucleus is looked for before the whole vocabulary is sorted.
_CANDIDATES = 1024


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_p keeps the smallest set of tokens with at least that probability."""

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature must be at least 0, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")


def request_randoms(seed: int, request: int, count: int) -> Tensor:
    """`count` uniform float64 numbers in [0, 1) that belong to one request alone.

    A request draws all of its numbers from a generator of its own, so what it samples doesn't depend on which others
    share its batch. Seed and request are hashed: with their sum, seed 1 would repeat seed 0 one request later.
    """
    digest = hashlib.sha256(f"{seed}:{request}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def next_tokens(logits: Tensor, sampling: Sampling, randoms: Tensor | None) -> Tensor:
    """The next token (B,) int64 of each row of `logits` (B, V); `randoms` (B,) uniform in [0, 1) unless greedy.

    Sampling inverts the cumulative distribution at the row's random number. Raises UserError when logits aren't finite.
    """
    best, greedy = logits.max(dim=-1)
    check_finite(torch.isfinite(best).all())
    if sampling.temperature == 0:
        return greedy
    assert randoms is not None
    probabilities = torch.softmax(logits.float() / sampling.temperature, dim=-1, dtype=torch.float32)
    if sampling.top_p == 1:
        return _invert(probabilities.double(), randoms)
    tokens, proven = _from_nucleus(probabilities, _largest(probabilities, _CANDIDATES), sampling.top_p, randoms)
    if not bool(proven.all()):
        rows = (~proven).nonzero()[:, 0]
        probabilities, randoms = probabilities[rows], randoms[rows]
        tokens[rows], _ = _from_nucleus(probabilities, _largest(probabilities, None), sampling.top_p, randoms)
    return tokens


def check_finite(finite: Tensor) -> None:
    """Raise UserError unless the largest logits are finite; a GPU's host waits for this."""
    if not bool(finite):
        raise UserError(
            "The model's logits are not finite (NaN or infinity): its weights are broken or training diverged; "
            "evaluate an earlier checkpoint."
        )


def _largest(probabilities: Tensor, count: int | None) -> Tensor:
    """The ids (B, count) of the largest probabilities, the largest first, equals by id; None: of all of them.

    Which of several equals stand at the end of `count` is open.
    """
    if count is None or count >= probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True).indices
    ids = probabilities.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return ids.gather(-1, probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)


def _from_nucleus(probabilities: Tensor, candidates: Tensor, top_p: float, randoms: Tensor) -> tuple[Tensor, Tensor]:
    """A token (B,) of each row's nucleus, and whether the candidates are proven to hold all of it.

    They are when the nucleus ends before a candidate that is less likely than all of it: everything as likely as the
    nucleus is then a candidate, in its place.
    """
    ordered = probabilities.gather(-1, candidates).double()
    # A token stays when the ones before it hold less than top_p: the first token always stays.
    inside = ordered.cumsum(dim=-1) - ordered < top_p
    chosen = _invert(ordered.masked_fill(~inside, 0.0), randoms)
    least = ordered.gather(-1, inside.sum(dim=-1, keepdim=True) - 1)[:, 0]
    proven = (least > ordered[:, -1]) | (candidates.shape[-1] == probabilities.shape[-1])
    return candidates.gather(-1, chosen[:, None])[:, 0], proven


def _invert(weights: Tensor, randoms: Tensor) -> Tensor:
    """The index at which the cumulated `weights` (B, V) first exceed `randoms` times their sum."""
    cumulated = weights.cumsum(dim=-1)
    index = torch.searchsorted(cumulated, (randoms * cumulated[:, -1])[:, None], right=True)[:, 0]
    # Rounding at the very end of the distribution must not select a token of probability zero.
    last = (weights > 0).int().mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).amax(-1) - 1
    return torch.minimum(index, last)
