"""Choosing a token in torch. Sorting 200,000 logits is what costs, so a nucleus is looked for among the likeliest."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import Choice

CANDIDATES = 1024
"""Among so many likeliest tokens a nucleus is looked for before the whole vocabulary is sorted."""


def choose_token_torch(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """Arguments and result as in `choose_token`."""
    best, greedy = logits.max(dim=-1)
    sampled = choice.temperature > 0
    on_host = logits.device.type == "cpu"  # elsewhere nothing is asked of the tensors: the host would have to wait
    if on_host and not bool(sampled.any()):
        return greedy, best
    temperature = torch.where(sampled, choice.temperature, 1.0).to(torch.promote_types(logits.dtype, torch.float32))
    # From the largest on, so that a temperature near 0 makes no infinity of it.
    below = (logits - best[:, None]).to(temperature.dtype)
    heat = temperature.clamp(min=torch.finfo(temperature.dtype).tiny)
    probabilities = torch.softmax(below / heat[:, None], dim=-1)
    # What is kept, by the smallest probability that a token may have.
    total = probabilities.masked_fill(probabilities < _least(probabilities, choice), 0.0)
    if on_host and bool(((choice.top_p == 1) & (choice.top_k == 0)).all()):
        tokens = _invert(total.double(), choice.randoms.double())
        return torch.where(sampled, tokens, greedy), best
    sums = total.double().sum(-1)
    count = CANDIDATES if on_host else None  # a GPU sorts them all in the time that it takes to find a thousand
    tokens, proven = _from_largest(probabilities, _largest(probabilities, count), sums, choice)
    if on_host and not bool(proven.all()):
        rows = (~proven).nonzero()[:, 0]
        some, few = probabilities[rows], Choice(*(value[rows] for value in choice))
        tokens[rows], _ = _from_largest(some, _largest(some, None), sums[rows], few)
    return torch.where(sampled, tokens, greedy), best


def _least(probabilities: Tensor, choice: Choice) -> Tensor:
    """(R, 1): the smallest probability that min_p lets pass."""
    return choice.min_p[:, None].to(probabilities.dtype) * probabilities.amax(-1, keepdim=True)


def _largest(probabilities: Tensor, count: int | None) -> Tensor:
    """The ids (R, count) of the largest probabilities, the largest first, equals by id; None: of all of them.

    Which of several equals stand at the end of `count` is open.
    """
    if count is None or count >= probabilities.shape[-1]:
        return probabilities.sort(dim=-1, descending=True, stable=True).indices
    ids = probabilities.topk(count, dim=-1, sorted=False).indices.sort(dim=-1).values
    return ids.gather(-1, probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices)


def _from_largest(probabilities: Tensor, ids: Tensor, sums: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """A token (R,) of each row's kept ones, and whether the candidates `ids` are proven to hold all of them.

    They are when what is kept ends before a candidate that is less likely than all of it: everything as likely is then
    a candidate, in its place. `sums`: the probability of what min_p lets pass.
    """
    ordered = probabilities.gather(-1, ids).double()
    rank = torch.arange(ids.shape[1], device=ids.device)
    passed = (choice.top_k[:, None] == 0) | (rank < choice.top_k[:, None])
    passed &= ordered >= _least(probabilities, choice)
    # A token stays when the ones before it hold less than top_p of what passes: the first token always stays.
    whole = torch.where(choice.top_k > 0, ordered.masked_fill(~passed, 0.0).sum(-1), sums)
    kept = passed & (ordered.cumsum(-1) - ordered < choice.top_p[:, None].double() * whole[:, None])
    by_id = ids.argsort(-1)
    weights = ordered.masked_fill(~kept, 0.0).gather(-1, by_id)
    chosen = by_id.gather(-1, _invert(weights, choice.randoms.double())[:, None])
    least = ordered.gather(-1, kept.sum(dim=-1, keepdim=True) - 1)[:, 0]
    proven = (least > ordered[:, -1]) | (ids.shape[-1] == probabilities.shape[-1])
    # With top_k the sum of what passes is that of candidates only.
    proven &= (choice.top_k <= ids.shape[1]) | (ids.shape[-1] == probabilities.shape[-1])
    return ids.gather(-1, chosen)[:, 0], proven


def _invert(weights: Tensor, randoms: Tensor) -> Tensor:
    """The index at which the cumulated `weights` (R, V) first exceed `randoms` times their sum."""
    cumulated = weights.cumsum(dim=-1)
    index = torch.searchsorted(cumulated, (randoms * cumulated[:, -1])[:, None], right=True)[:, 0]
    # Rounding at the very end of the distribution must not select a token of probability zero.
    last = (weights > 0).int().mul(torch.arange(1, weights.shape[-1] + 1, device=weights.device)).amax(-1) - 1
    return torch.minimum(index, last)
