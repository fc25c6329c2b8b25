"""What a choice depends on beside the logits."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Choice(NamedTuple):
    """How each of R rows is chosen.

    Attributes:
        temperature: (R,), what logits are divided by; 0 is greedy.
        top_k: (R,), whole numbers, keep so many of the largest; 0 keeps all.
        top_p: (R,), of those keep the fewest largest that hold at least this share of their probability.
        min_p: (R,), keep tokens of at least this share of the largest probability.
        randoms: (R,), uniform in [0, 1); greedy rows don't read theirs.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    randoms: Tensor
