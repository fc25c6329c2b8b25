"""What is answered: requests of given lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Requests, by their tokens.

    Attributes:
        prompts: of each one's prompt.
        answers: of each one's answer.
    """

    what: str
    prompts: tuple[int, ...]
    answers: tuple[int, ...]

    def texts(self, vocabulary: int, seed: int) -> list[list[int]]:
        """Token ids of the prompts: random, so that no two are alike."""
        draw = random.Random(seed)
        return [[draw.randrange(1, vocabulary) for _ in range(length)] for length in self.prompts]

    def short(self) -> Workload:
        """As many requests that take little time: what is compiled or packed when it is first used is so before."""
        return Workload("", tuple(min(64, x) for x in self.prompts), tuple(min(4, x) for x in self.answers))


def even(requests: int, prompt: int, new: int) -> Workload:
    """So many requests alike."""
    return Workload(f"{requests} x ({prompt:,} + {new:,})", (prompt,) * requests, (new,) * requests)


def uneven(requests: int, shortest: int, longest: int) -> Workload:
    """Prompts and answers of any length in between; each doubling has as many."""
    draw = random.Random(0)
    lengths = [round(shortest * (longest / shortest) ** draw.random()) for _ in range(2 * requests)]
    what = f"{requests} x ({shortest:,} to {longest:,} + {shortest:,} to {longest:,})"
    return Workload(what, tuple(lengths[::2]), tuple(lengths[1::2]))


WORKLOADS = {
    "short": even(16, 128, 256),
    "long-answer": even(1, 512, 1024),
    "long-prompt": even(1, 4096, 64),
    "long-both": even(8, 2048, 2048),
    "uneven": uneven(64, 32, 2048),
}


def grid(requests: Sequence[int], prompts: Sequence[int], answers: Sequence[int]) -> list[Workload]:
    """Each with each."""
    return [even(count, prompt, new) for count in requests for prompt in prompts for new in answers]
