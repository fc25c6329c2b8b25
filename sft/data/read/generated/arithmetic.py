"""Multi-step arithmetic: a number, and what is done to it."""

from __future__ import annotations

import random

from sft.data.read.generated.chains import draw as draw_chain
from sft.data.read.generated.problem import Problem


def draw(rng: random.Random, steps: int, scaling: float) -> Problem:
    """A problem of `steps` calculations (a long one of at most as many)."""
    chain = draw_chain(rng, steps, scaling)
    return chain.pose(f"Start with {chain.start}.", chain.tell([str(move) for move in chain.moves]), "Result?")
