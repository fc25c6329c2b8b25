"""Short word problems: a chain of calculations told as events, in one of several settings with varied names."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sft.data.read.generated.chains import draw as draw_chain
from sft.data.read.generated.problem import Move, Problem


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Alan Amir Anna Bela Bo Carl Chen Cora Dana Elif Emma Eva Finn Gita Hana Hugo Ida Igor Ines Ivan Jana Kai Lea
    Leo Lina Luca Mara Mei Milo Nina Noah Omar Otto Pia Raul Rita Sara Tara Theo Uma Vera Yuri Zoe
    """
)
THINGS = _words("apples beads books buttons cards coins eggs figs keys lemons nuts pears pens plums roses")


@dataclass(frozen=True)
class _Setting:
    """How a story says things; {n} is the operand."""

    opening: str
    gain: tuple[str, ...]
    loss: tuple[str, ...]
    question: str


_SETTINGS = (
    _Setting(
        "{name} trades {thing} and has {n}.",
        ("buys {n}", "finds {n}"),
        ("sells {n}", "loses {n}"),
        "How many {thing} has {name} now?",
    ),
    _Setting(
        "{name} saves money and has {n}.",
        ("earns {n}",),
        ("spends {n}",),
        "How much has {name} now?",
    ),
    _Setting(
        "{name} drives a bus with {n} riders.",
        ("board {n}",),
        ("leave {n}",),
        "How many riders has {name} now?",
    ),
)
_SCALED = {"*": "multiplies by {n}", "/": "divides by {n}"}


def _event(rng: random.Random, setting: _Setting, move: Move) -> str:
    if move.operator in _SCALED:
        text = _SCALED[move.operator]
    else:
        text = rng.choice(setting.gain if move.operator == "+" else setting.loss)
    return text.format(n=move.operand)


def draw(rng: random.Random, steps: int, scaling: float) -> Problem:
    """A story of `steps` calculations (a long one of at most as many)."""
    chain = draw_chain(rng, steps, scaling)
    setting, name, thing = rng.choice(_SETTINGS), rng.choice(NAMES), rng.choice(THINGS)
    told = chain.tell([_event(rng, setting, move) for move in chain.moves])
    opening = setting.opening.format(name=name, thing=thing, n=chain.start)
    return chain.pose(opening, told, setting.question.format(name=name, thing=thing))
