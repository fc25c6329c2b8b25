"""Names of quantities: A0, A1, ... T9, so that a long problem can name each of its quantities differently."""

from __future__ import annotations

import random

LABELS: tuple[str, ...] = tuple(f"{letter}{digit}" for letter in "ABCDEFGHIJKLMNOPQRST" for digit in "0123456789")


def draw_labels(rng: random.Random, count: int) -> tuple[str, ...]:
    """`count` consecutive labels from a random place (`count` at most len(LABELS))."""
    start = rng.randint(0, len(LABELS) - count)
    return LABELS[start : start + count]
