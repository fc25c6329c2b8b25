"""Chains of calculations: each quantity follows from the one before it. What arithmetic and word problems share."""

from __future__ import annotations

import random
from dataclasses import dataclass

from sft.data.procedural.numbers import LARGEST, SMALLEST, compute, draw_operand, worked

_OPERATORS = "+-*/"
_WEIGHTS = (34, 34, 16, 16)


@dataclass(frozen=True)
class Move:
    """One calculation: the quantity before it, `operator`, and a constant or (`reference`) an earlier quantity."""

    operator: str
    operand: int
    reference: int | None = None


@dataclass(frozen=True)
class Chain:
    """A first value and the moves made from it; `values[i]` is the quantity after `i` moves."""

    values: tuple[int, ...]
    moves: tuple[Move, ...]

    def canonical(self) -> str:
        """The problem without its wording: what is calculated."""
        parts = [f"{m.operator}{m.operand if m.reference is None else f'[{m.reference}]'}" for m in self.moves]
        return f"{self.values[0]}{''.join(parts)}"

    def operand(self, index: int, labels: tuple[str, ...]) -> str:
        """How the operand of move `index` is written in the problem."""
        move = self.moves[index]
        return str(move.operand) if move.reference is None else labels[move.reference]

    def solution(self, labels: tuple[str, ...]) -> str:
        """Every quantity in turn: its definition, the definition with values put in, and the calculation."""
        lines = [f"{labels[0]} = {self.values[0]}"]
        for index, move in enumerate(self.moves):
            definition = f"{labels[index]} {move.operator} {self.operand(index, labels)}"
            lines.append(
                f"{labels[index + 1]} = {definition} = {worked(self.values[index], move.operator, move.operand)}"
            )
        return "\n".join(lines)


def _draw_move(rng: random.Random, values: list[int], reference_share: float) -> Move:
    value = values[-1]
    while True:
        operator = rng.choices(_OPERATORS, _WEIGHTS)[0]
        if operator in "+-" and len(values) > 1 and rng.random() < reference_share:
            reference = rng.randrange(len(values) - 1)
            if SMALLEST <= compute(value, operator, values[reference]) <= LARGEST:
                return Move(operator, values[reference], reference)
        operand = draw_operand(rng, value, operator)
        if operand is not None:
            return Move(operator, operand)


def draw_chain(rng: random.Random, steps: int, *, reference_share: float) -> Chain:
    """A chain of `steps` moves; `reference_share` of the additions and subtractions use an earlier quantity."""
    values = [rng.randint(SMALLEST, LARGEST)]
    moves = []
    for _ in range(steps):
        move = _draw_move(rng, values, reference_share)
        moves.append(move)
        values.append(compute(values[-1], move.operator, move.operand))
    return Chain(tuple(values), tuple(moves))
