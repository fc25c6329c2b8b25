"""Arithmetic on whole numbers up to 99, written out so that every written symbol follows from a few earlier ones."""

from __future__ import annotations

import random

LARGEST = 99
"""Every number in a problem is at most this."""
SMALLEST = 2
"""Every quantity in a chain of calculations is at least this: else 1 would be a common answer."""

_COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a // b}


def compute(left: int, operator: str, right: int) -> int:
    """`left operator right` for one of `+ - * /` (division is exact in every problem)."""
    return _COMPUTE[operator](left, right)


def worked(left: int, operator: str, right: int) -> str:
    """The calculation in writing, e.g. `47 + 38 = 77 + 8 = 85`.

    A two-digit operand is added or subtracted tens first, then units: so each `=` asks for one look-up in the tables of
    one-digit arithmetic. Multiplying and dividing (by 2..9) are one look-up in the multiplication table.
    """
    result = compute(left, operator, right)
    units = right % 10
    if operator in "*/" or right < 10 or units == 0:
        return f"{left} {operator} {right} = {result}"
    between = compute(left, operator, right - units)
    return f"{left} {operator} {right} = {between} {operator} {units} = {result}"


def draw_operand(rng: random.Random, value: int, operator: str) -> int | None:
    """An operand for which `value operator operand` is a whole number in 2..99, or None where there is none."""
    if operator in "+-":
        room = LARGEST - value if operator == "+" else value - SMALLEST
        if room < 1:
            return None
        return rng.randint(1, min(9, room)) if rng.random() < 0.4 else rng.randint(1, room)
    if operator == "*":
        choices = list(range(2, min(9, LARGEST // value) + 1))
    else:
        choices = [divisor for divisor in range(2, 10) if value % divisor == 0 and value // divisor >= SMALLEST]
    return rng.choice(choices) if choices else None
