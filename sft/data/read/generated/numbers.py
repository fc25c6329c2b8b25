"""Arithmetic on two-digit numbers with one-digit operands: one look-up in the tables of school for each step."""

from __future__ import annotations

import random

SMALLEST, LARGEST = 10, 99
"""Every value has two digits, so that a calculation always has the same shape."""
LARGEST_OPERAND = 5
"""Operands go from 1 (2 for factors) to this: small tables, which a small model can learn whole."""

_COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}
INVERSE = {"+": "-", "-": "+", "*": "/", "/": "*"}


def compute(left: int, operator: str, right: int) -> int:
    """`left operator right` for one of `+ - * /` (division is exact in every problem)."""
    return _COMPUTE[operator](left, right)


def in_range(value: int) -> bool:
    """Whether `value` has two digits."""
    return SMALLEST <= value <= LARGEST


def draw_operand(rng: random.Random, value: int, operator: str) -> int | None:
    """A one-digit operand for which `value operator operand` is exact and has two digits; None where there is none."""
    smallest = 1 if operator in "+-" else 2
    choices = [
        operand
        for operand in range(smallest, LARGEST_OPERAND + 1)
        if (operator != "/" or value % operand == 0) and in_range(compute(value, operator, operand))
    ]
    return rng.choice(choices) if choices else None
