"""Random chains of calculations whose every value has two digits."""

from __future__ import annotations

import random

from sft.data.read.generated.numbers import LARGEST, LARGEST_OPERAND, SMALLEST, compute, draw_operand, in_range
from sft.data.read.generated.problem import Chain, Move

MOST_SHORT_STEPS = 8
"""Problems with more steps are told as rounds of the same few calculations."""
MOST_MOVES = 8
MOST_ROUNDS = 16
MOST_ROUNDS_OF_LONGEST = 20
"""Rounds of problems with more steps than MOST_ROUNDS of them make; fewer steps never take so many rounds."""
MAX_STEPS = MOST_ROUNDS_OF_LONGEST * MOST_MOVES


def draw(rng: random.Random, steps: int, scaling: float) -> Chain:
    """A chain of `steps` calculations, each with chance `scaling` one of * and /, where its value allows it.

    A long chain has about, and never more than, so many, all of them + and -.
    """
    return _draw_rounds(rng, steps) if steps > MOST_SHORT_STEPS else _draw_short(rng, steps, scaling)


def _draw_short(rng: random.Random, steps: int, scaling: float) -> Chain:
    chances = [1 - scaling, 1 - scaling, scaling, scaling]
    start = value = rng.randint(SMALLEST, LARGEST)
    moves: list[Move] = []
    while len(moves) < steps:
        operator = rng.choices("+-*/", chances)[0]
        operand = draw_operand(rng, value, operator)
        if operand is not None:
            moves.append(Move(operator, operand))
            value = compute(value, operator, operand)
    return Chain(start, tuple(moves))


def _draw_rounds(rng: random.Random, steps: int) -> Chain:
    """A few additions and subtractions, many rounds.

    A round changes the value by a little, so that no round repeats another and all values keep two digits.
    """
    fewest = max(2, -(-steps // MOST_MOVES))
    most = MOST_ROUNDS if steps <= MOST_ROUNDS * MOST_MOVES else MOST_ROUNDS_OF_LONGEST
    while True:
        rounds = rng.randint(fewest, max(fewest, min(most, steps // 2)))
        count = steps // rounds
        drift = rng.choice((-1, 1)) * rng.randint(1, max(1, min(3, MOST_ROUNDS // rounds)))
        moves = _round_of(rng, count, drift)
        start = rng.randint(SMALLEST, LARGEST)
        # Values move one way from round to round, so the first and the last round hold the extremes.
        if moves and _stays(start, moves) and _stays(start + drift * (rounds - 1), moves):
            return Chain(start, moves, rounds)


def _round_of(rng: random.Random, count: int, drift: int) -> tuple[Move, ...] | None:
    """`count` moves that add up to `drift`, or None when the last one would not have one digit."""
    changes = [rng.choice((-1, 1)) * rng.randint(1, LARGEST_OPERAND) for _ in range(count - 1)]
    last = drift - sum(changes)
    if not 1 <= abs(last) <= LARGEST_OPERAND:
        return None
    return tuple(Move("+" if change > 0 else "-", abs(change)) for change in (*changes, last))


def _stays(value: int, moves: tuple[Move, ...]) -> bool:
    """Whether every value of one round has two digits."""
    for move in moves:
        value = compute(value, move.operator, move.operand)
        if not in_range(value):
            return False
    return True
