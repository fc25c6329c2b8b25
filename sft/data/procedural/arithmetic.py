"""Multi-step arithmetic: a list of definitions, each using the one before it (and perhaps another earlier one)."""

from __future__ import annotations

import random

from sft.data.procedural.chains import draw_chain
from sft.data.procedural.labels import draw_labels
from sft.data.procedural.problem import Problem


def draw(rng: random.Random, steps: int) -> Problem:
    """A problem whose last quantity takes `steps` calculations."""
    chain = draw_chain(rng, steps, reference_share=0.2)
    labels = draw_labels(rng, steps + 1)
    lines = [f"{labels[0]} = {chain.values[0]}"]
    for index, move in enumerate(chain.moves):
        lines.append(f"{labels[index + 1]} = {labels[index]} {move.operator} {chain.operand(index, labels)}")
    lines.append(f"Find {labels[-1]}.")
    return Problem(chain.canonical(), "\n".join(lines), chain.solution(labels), chain.values[-1])
