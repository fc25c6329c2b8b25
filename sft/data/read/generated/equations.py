"""Linear equations, each with one new unknown: a system solved step by step; a long one starts anew from its result."""

from __future__ import annotations

import random
from itertools import pairwise

from sft.data.read.generated.chains import draw as draw_chain
from sft.data.read.generated.numbers import INVERSE
from sft.data.read.generated.problem import Move, Problem

UNKNOWNS = "abcdefghijklm"


def _equation(move: Move, before: str, unknown: str) -> str:
    """The equation that `unknown = before <move>` solves, e.g. `b - 4 = a` for b = a + 4."""
    return f"{unknown} {INVERSE[move.operator]} {move.operand} = {before}"


def draw(rng: random.Random, steps: int, scaling: float) -> Problem:
    """Equations whose solution takes `steps` calculations (a long one at most as many).

    In a long one the last unknown of a round is what the first letter stands for in the next.
    """
    chain = draw_chain(rng, steps, scaling)
    names = UNKNOWNS[: len(chain.moves) + 1]
    told = chain.tell([_equation(move, *pair) for move, pair in zip(chain.moves, pairwise(names), strict=True)])
    so = [f" so {name} =" for name in names[1:]]
    return chain.pose(f"Start with {names[0]} = {chain.start}.", told, f"Find {names[-1]}.", so)
