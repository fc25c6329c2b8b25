"""Linear equations: one with an unknown, then more in which the unknown before it has to be put in.

A step is one move: putting a value in, collecting the unknown on one side, taking a term to the other side, dividing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from sft.data.procedural.labels import draw_labels
from sft.data.procedural.numbers import LARGEST, compute, worked
from sft.data.procedural.problem import Problem

_INVERSE = {"+": "-", "-": "+"}
_MOST_PUT_IN = 90
"""Unknowns stay below this, so that there is always a next equation with both sides within 1..99."""


@dataclass(frozen=True)
class _Equation:
    """`coefficient * unknown sign term = right`, perhaps with `collected` more of the unknown on both sides."""

    unknown: int
    coefficient: int
    sign: str
    term: int
    right: int
    collected: int = 0
    put_in: bool = False

    def canonical(self) -> str:
        term = "x" if self.put_in else str(self.term)
        return f"{self.coefficient},{self.collected}{self.sign}{term}={self.right}"

    def text(self, label: str, before: str) -> str:
        term = before if self.put_in else str(self.term)
        left = f"{_times(self.coefficient + self.collected, label)} {self.sign} {term}"
        if self.collected:
            return f"{left} = {self.collected} * {label} + {self.right}"
        return f"{left} = {self.right}"

    def solution(self, label: str, before: str) -> list[str]:
        lines = [self.text(label, before)]
        multiple = _times(self.coefficient, label)
        if self.put_in or self.collected:
            lines.append(f"{multiple} {self.sign} {self.term} = {self.right}")
        lines.append(f"{multiple} = {worked(self.right, _INVERSE[self.sign], self.term)}")
        if self.coefficient > 1:
            lines.append(f"{label} = {worked(self.coefficient * self.unknown, '/', self.coefficient)}")
        return lines


def _times(coefficient: int, label: str) -> str:
    return f"{coefficient} * {label}" if coefficient > 1 else label


def _draw_sizes(rng: random.Random, steps: int) -> list[int]:
    """Steps of each equation, 2 or 3 each, `steps` in all, mostly 3."""
    twos = rng.choice([count for count in range(steps // 2 + 1) if (steps - 2 * count) % 3 == 0][:2])
    sizes = [2] * twos + [3] * ((steps - 2 * twos) // 3)
    rng.shuffle(sizes)
    return sizes


def _draw_first(rng: random.Random, size: int) -> _Equation:
    while True:
        unknown = rng.randint(2, 49)
        coefficient = rng.randint(2, min(7, LARGEST // unknown))
        collected = rng.randint(2, 9 - coefficient) if size == 3 else 0
        sign = rng.choice("+-")
        term = rng.randint(1, 98)
        right = compute(coefficient * unknown, sign, term)
        if 1 <= right <= LARGEST:
            return _Equation(unknown, coefficient, sign, term, right, collected)


def _draw_next(rng: random.Random, size: int, before: int) -> _Equation:
    while True:
        unknown = rng.randint(2, 49) if size == 3 else rng.randint(1, _MOST_PUT_IN)
        coefficient = rng.randint(2, min(9, LARGEST // unknown)) if size == 3 else 1
        sign = rng.choice("+-")
        right = compute(coefficient * unknown, sign, before)
        if 1 <= right <= LARGEST:
            return _Equation(unknown, coefficient, sign, before, right, put_in=True)


def draw(rng: random.Random, steps: int) -> Problem:
    """Equations that take `steps` moves to solve."""
    equations: list[_Equation] = []
    for size in _draw_sizes(rng, steps):
        equations.append(_draw_next(rng, size, equations[-1].unknown) if equations else _draw_first(rng, size))
    labels = draw_labels(rng, len(equations))
    befores = ("", *labels[:-1])
    named = list(zip(equations, labels, befores, strict=True))
    texts = [equation.text(label, before) for equation, label, before in named]
    lines = [line for equation, label, before in named for line in equation.solution(label, before)]
    canonical = "solve " + ";".join(equation.canonical() for equation in equations)
    return Problem(canonical, "\n".join([*texts, f"Solve for {labels[-1]}."]), "\n".join(lines), equations[-1].unknown)
