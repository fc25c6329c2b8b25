"""Short word problems: a chain of calculations told as a story, in one of several settings with varied names."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sft.data.procedural.chains import Chain, draw_chain
from sft.data.procedural.labels import draw_labels
from sft.data.procedural.problem import Problem


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    """
    Ada Alan Amir Anna Bela Bo Carl Chen Cora Dana Dean Elif Emma Eva Finn Gita Hana Hugo Ida Igor Ines Ivan Jack
    Jana Jose Juan Kai Kim Lea Leo Lina Lisa Luca Mara Marc Mei Mia Milo Nadia Nina Noah Nora Olga Omar Otto Paul
    Pia Rana Raul Rita Rosa Sara Sean Tara Theo Tim Uma Vera Will Yuri Zoe
    """
)
THINGS = _words(
    """
    apples beads books buttons cards coins eggs figs keys lemons marbles nails nuts pears pens plums roses seeds
    shells stamps
    """
)
PLACES = _words(
    """
    bag basket bin bowl box case crate drawer jar room sack shelf
    """
)


@dataclass(frozen=True)
class _Diary:
    """How a story told event by event says things; {n} is the operand."""

    opening: str
    moment: str
    first: str
    gain: tuple[str, ...]
    loss: tuple[str, ...]
    question: str


_DIARIES = (
    _Diary(
        "{name} trades {thing}.", "Day", "has {n}", ("buys {n}", "gets {n}"), ("sells {n}", "loses {n}"),
        "How many {thing} has {name} after day {label}?",
    ),
    _Diary(
        "{name} saves money.", "Week", "starts with {n}", ("earns {n}", "wins {n}"), ("spends {n}", "pays {n}"),
        "How much has {name} after week {label}?",
    ),
    _Diary(
        "{name} drives a bus.", "Stop", "{n} get on", ("{n} get on", "{n} more board"), ("{n} get off", "{n} leave"),
        "How many are on the bus of {name} after stop {label}?",
    ),
)  # fmt: skip
_COMPARED = {
    "+": "{n} more than {place} {before}",
    "-": "{n} fewer than {place} {before}",
    "*": "{n} times as many as {place} {before}",
    "/": "1/{n} of {place} {before}",
}
_SCALED = {"*": "now {n} times as many", "/": "only 1/{n} left"}


def _tell_places(rng: random.Random, chain: Chain, labels: tuple[str, ...]) -> str:
    name, thing, place = rng.choice(NAMES), rng.choice(THINGS), rng.choice(PLACES)
    told = [f"{name} keeps {thing}.", f"The {place} {labels[0]} holds {chain.values[0]}."]
    for index, move in enumerate(chain.moves):
        amount = _COMPARED[move.operator].format(n=move.operand, place=place, before=labels[index])
        told.append(f"The {place} {labels[index + 1]} holds {amount}.")
    told.append(f"How many {thing} are in {place} {labels[-1]}?")
    return " ".join(told)


def _tell_diary(rng: random.Random, chain: Chain, labels: tuple[str, ...], diary: _Diary) -> str:
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    told = [diary.opening.format(name=name, thing=thing)]
    told.append(f"{diary.moment} {labels[0]}: {diary.first.format(n=chain.values[0])}.")
    for label, move in zip(labels[1:], chain.moves, strict=True):
        if move.operator in _SCALED:
            event = _SCALED[move.operator]
        else:
            event = rng.choice(diary.gain if move.operator == "+" else diary.loss)
        told.append(f"{diary.moment} {label}: {event.format(n=move.operand)}.")
    told.append(diary.question.format(name=name, thing=thing, label=labels[-1]))
    return " ".join(told)


def draw(rng: random.Random, steps: int) -> Problem:
    """A story whose answer takes `steps` calculations."""
    chain = draw_chain(rng, steps, reference_share=0.0)
    labels = draw_labels(rng, steps + 1)
    setting = rng.randrange(2 + len(_DIARIES))
    places = setting < 2
    prompt = _tell_places(rng, chain, labels) if places else _tell_diary(rng, chain, labels, _DIARIES[setting - 2])
    return Problem(chain.canonical(), prompt, chain.solution(labels), chain.values[-1])
