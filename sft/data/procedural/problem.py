"""One generated problem."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """A question, its worked solution and its answer.

    `canonical` is the problem without its names and wording: two problems with the same calculations have the same one.
    """

    canonical: str
    prompt: str
    solution: str
    answer: int
