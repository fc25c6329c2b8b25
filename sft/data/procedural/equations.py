"""Linear equations, each with one new unknown: a system solved step by step, or, if long, a recurrence followed."""

from __future__ import annotations

import random

from sft.data.procedural.chains import draw as draw_chain
from sft.data.procedural.numbers import INVERSE
from sft.data.procedural.problem import Move, Problem

UNKNOWNS = "abcdefghijklm"


def _equation(move: Move, before: str, unknown: str) -> str:
    """The equation that `unknown = before <move>` solves, e.g. `b - 4 = a` for b = a + 4."""
    return f"{unknown} {INVERSE[move.operator]} {move.operand} = {before}"


def draw(rng: random.Random, steps: int) -> Problem:
    """Equations whose solution takes `steps` calculations (a long one at most as many)."""
    chain = draw_chain(rng, steps)
    long = chain.rounds > 1
    names = ["x", *["y"] * len(chain.moves)] if long else list(UNKNOWNS[: len(chain.moves) + 1])
    before = ["x"] * len(chain.moves) if long else names
    told = chain.tell([_equation(move, before[i], names[i + 1]) for i, move in enumerate(chain.moves)])
    so = [f" so {name} =" for name in names[1:]]
    return chain.pose(f"Start with {names[0]} = {chain.start}.", told, f"Find {names[-1]}.", so)
