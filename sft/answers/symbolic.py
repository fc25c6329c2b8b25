"""Comparing as mathematics, with math-verify. It can take for ever, or all memory: only `worker` calls it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from sft.answers.compare import Found

# A decimal may be the rounding of what is no decimal from six digits on; fewer digits are meant as they stand.
_ROUNDED, _EXACT = 6, 15
_DECIMAL = re.compile(r"\d*\.\d+")


@lru_cache(maxsize=1024)
def equal(mine: str, gold: str) -> Found:
    """The verdict on two answers that stand alone, as mathematics."""
    wanted = _parse(gold)
    if not wanted:
        return "undecided", "the gold answer can't be read"
    given = _parse(mine)
    if not given:
        return "wrong", "the answer can't be read"
    return _compare(wanted, given, _EXACT if any(map(_short, (mine, gold))) else _ROUNDED)


def _short(text: str) -> bool:
    return any(len(decimal.replace(".", "").lstrip("0")) < _ROUNDED for decimal in _DECIMAL.findall(text))


def _parse(answer: str) -> list[Any]:
    """What math-verify reads. Boxing it makes it take all of it, not the last number in it."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units were seen to before; here `2t` is no 2, and `3c` is not `3d`.
    latex = NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all")
    config = [LatexExtractionConfig(normalization_config=latex)]
    return [_evaluated(part) for part in parse(f"\\boxed{{{answer}}}", config, parsing_timeout=None)]


def _evaluated(part: Any) -> Any:
    """With `i` as the imaginary unit, and sets put together."""
    import sympy

    if isinstance(part, (sympy.Expr, sympy.FiniteSet)):
        return part.subs({symbol: sympy.I for symbol in part.free_symbols if symbol.name == "i"})
    return part.doit() if isinstance(part, (sympy.Union, sympy.Intersection, sympy.Complement)) else part


def _compare(wanted: Iterable[Any], given: Iterable[Any], rounding: int) -> Found:
    """Right if any reading of one equals any reading of the other; undecided if no pair could be compared."""
    from math_verify import verify
    from sympy.core import random

    # sympy tests equality with random numbers, too: the same ones, whatever came before.
    random.seed(0)
    compared, failure = 0, ""
    for gold in wanted:
        for answer in given:
            try:
                if verify(
                    gold, answer, rounding, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True
                ):
                    return "right", "math-verify"
                compared += isinstance(gold, str) == isinstance(answer, str)
            except MemoryError:
                raise
            except Exception as error:
                failure = type(error).__name__
    if failure and not compared:
        return "undecided", f"comparison failed: {failure}"
    return "wrong", "math-verify"
