"""Whether two answers are one: as texts, numbers, times, words, by their parts, and what is left as mathematics."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from typing import Literal

from sft.answers.normal import LEADING, normal, unwrapped
from sft.answers.numbers import parse_number, same_number
from sft.answers.parts import Parts, as_interval, assigned, parts_of, split
from sft.answers.times import same_ratio, same_time
from sft.answers.units import in_unit, unit_of
from sft.answers.words import compare_words

Status = Literal["right", "wrong", "undecided"]
Found = tuple[Status, str]
Math = Callable[[str, str], Found]
"""Compares two texts (an answer, the gold one) as mathematics; it may raise to say that another process must."""
_DEEPEST, _MOST_PAIRS = 4, 2000
_BEST = ("right", "undecided", "wrong")
_UNION, _SETS = re.compile(r"\\cup(?![A-Za-z])"), re.compile(r"\\(?:cup|cap|setminus)(?![A-Za-z])")
_STACK, _UNSPACED, _ASIDE = (
    re.compile(r"\\(?:begin|end)\{(?:cases|aligned|gathered|align\*?)\}"),
    re.compile(r"(?<=\d)(?=[A-Za-z])"),
    re.compile(r"\s\([A-Za-z -]+\)$"),
)
_TRAILING_UNIT = re.compile(
    r"(.*[\w})])(\s?(?:\^\\circ|\\[a-z]+\s?\{[^{}]+\}(?:\^\{?[23]\}?)?| [A-Za-z]{1,12}(?: [A-Za-z]{1,12})?))"
)

_INTEGER = re.compile(r"(?<![A-Za-z\\])[kmn](?![A-Za-z])")
_FAMILY = re.compile(
    r"(.{1,300}?)(?:,\s?|\s)\(?(?:(?:where|for)\s)?(?:(?:any |all |some )?integers? [kmn]"
    r"|[kmn]\s?(?:\\in\s?\\mathbb\s?\{?Z\}?| is an integer))\)?"
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![A-Za-z])")
_TURN = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s?\^\\circ")


def compare(mine: str, gold: str, math: Math, depth: int = 0) -> Found:
    """The verdict on two answers that stand alone, and how it was found."""
    one, other = _unstacked(normal(mine)), _unstacked(normal(gold))
    if one == other:
        return "right", "same text"
    for reader in (_numbers, _times, compare_words):
        found = reader(one, other)
        if found is not None:
            return found  # type: ignore[return-value]
    families = [_FAMILY.fullmatch(" ".join(unwrapped(text).split())) for text in (one, other)]
    if any(families):
        # The integer in `k\pi, k \in \mathbb{Z}` and in `n\pi` has one name here.
        pairs = zip(families, (one, other), strict=True)
        one, other = (_INTEGER.sub("n", family[1] if family else text) for family, text in pairs)
    found = _parts(one, other, math, depth) if depth < _DEEPEST else None
    return found or _measured(one, other, math)


def _unstacked(text: str) -> str:
    r"""The lines of `cases` and the like as a list."""
    if r"\\" not in text or "matrix" in text or "array" in text:
        return text
    return _STACK.sub("", text).replace(r"\\", ", ").replace("&", "").strip(" ,")


def _numbers(mine: str, gold: str) -> Found | None:
    one, other = (
        parse_number(text) or parse_number(_ASIDE.sub("", LEADING.sub("", unwrapped(text)))) for text in (mine, gold)
    )
    # `3h` may be a product; beside a time it isn't.
    if one is None and other and other.unit:
        one = parse_number(_UNSPACED.sub(" ", mine))
    elif other is None and one and one.unit:
        other = parse_number(_UNSPACED.sub(" ", gold))
    names = {found[0] for text in (mine, gold) if (found := assigned(text))}
    if one is None or other is None or (one.listed and other.listed) or len(names) > 1:
        return None
    same = same_number(one, other)
    if same is None:
        reason = "written in two ways" if one.other is not None or other.other is not None else ""
        units = ", ".join("%" if number.percent else number.unit or "none" for number in (one, other))
        return "undecided", reason or f"depends on the unit: {units}"
    if other.listed and same:
        return "undecided", "the gold answer may be one number or two"
    return ("right", "same number") if same else ("wrong", "other number")


def _times(mine: str, gold: str) -> Found | None:
    same, ratio = same_time(mine, gold), same_ratio(mine, gold)
    if isinstance(same, str):
        return "undecided", same
    if same is None and ratio is None:
        return None
    if same is False and ratio:
        return "undecided", "a time or a ratio"
    return ("right", "same time") if same or ratio else ("wrong", "another time")


def _parts(mine: str, gold: str, math: Math, depth: int) -> Found | None:
    intervals = as_interval(mine), as_interval(gold)
    if intervals[0] or intervals[1]:
        names = {found[0] for found in intervals if found and found[0]}
        if len(names) > 1:
            return "wrong", "other variables"
        mine, gold = (found[1] if found else _value(text) for found, text in zip(intervals, (mine, gold), strict=True))
    elif (found := _equations(mine, gold, math, depth)) is not None:
        return found
    else:
        mine, gold = (_value(text) if text.count("=") <= 1 and r"\in" in text else text for text in (mine, gold))
    if _SETS.search(mine) or _SETS.search(gold):
        pieces, others = (Parts("list", tuple(split(text, _UNION))) for text in (mine, gold))
        found = _unordered(pieces, others, math, depth)
        return found if found[0] == "right" else math(mine, gold)
    one, other = parts_of(mine), parts_of(gold)
    if one is None and other is None:
        return None
    if one is None or other is None:
        found = _alone(one or Parts("list", (mine,)), other or Parts("list", (gold,)), math, depth)
        return found if found[0] != "wrong" or _plain(mine if one is None else gold) else math(mine, gold)
    return _together(one, other, math, depth)


def _plain(text: str) -> bool:
    return parse_number(text) is not None or text.isalnum()


def _alone(one: Parts, other: Parts, math: Math, depth: int) -> Found:
    if len(one.items) != len(other.items):
        # `1/2 or 50%` is one number in two ways.
        few, many = sorted((one.items, other.items), key=len)
        alike = len(few) == 1 and len(many) < 4
        alike = alike and all(compare(item, few[0], math, depth + 1)[0] == "right" for item in many)
        return ("right", "the same in several ways") if alike else ("wrong", "another number of parts")
    return compare(one.items[0], other.items[0], math, depth + 1)


def _together(one: Parts, other: Parts, math: Math, depth: int) -> Found:
    kinds = {one.kind, other.kind}
    if kinds <= {"tuple"} and one.ends != other.ends:
        return "wrong", "other brackets"
    if "set" in kinds and kinds & {"tuple", "vector"}:
        same = _unordered(one, other, math, depth)
        return (
            ("undecided", "a set beside a list")
            if same[0] == "right" and "[]" in (one.ends, other.ends) and len(one.items) > 2
            else ("wrong", "a set beside a tuple")
        )
    if "tuple" in kinds and "list" in kinds and not {one.ends, other.ends} & {"()", "[]"}:
        return "wrong", "an interval beside a list"
    return (_ordered if one.ordered or other.ordered else _unordered)(one, other, math, depth)


def _ordered(one: Parts, other: Parts, math: Math, depth: int) -> Found:
    if len(one.items) != len(other.items):
        return "wrong", "another number of parts"
    found = [compare(a, b, math, depth + 1) for a, b in zip(one.items, other.items, strict=True)]
    return next((f for f in found if f[0] == "wrong"), None) or next(
        (f for f in found if f[0] == "undecided"), ("right", "same parts")
    )


def _unordered(one: Parts, other: Parts, math: Math, depth: int) -> Found:
    """Each part of one is a part of the other; of lists, as often."""
    mine, gold = Counter(map(normal, one.items)), Counter(map(normal, other.items))
    as_set = "set" in (one.kind, other.kind)
    # What is written alike is paired off, so that long lists take no time.
    items = [item for item in mine if item not in gold] if as_set else list((mine - gold).elements())
    wanted = [item for item in gold if item not in mine] if as_set else list((gold - mine).elements())
    if len(items) != len(wanted) and not as_set:
        return "wrong", "another number of parts"
    if (len(items) + len(wanted)) * (len(mine) + len(gold)) > _MOST_PAIRS:
        return "undecided", "too many parts to compare"
    doubt = ""
    for item in items:
        found = {other: compare(item, other, math, depth + 1) for other in (gold if as_set else wanted)}
        best = min(found, key=lambda other: _BEST.index(found[other][0]), default=None)
        if best is None or found[best][0] == "wrong":
            return "wrong", "other parts"
        doubt = doubt or (found[best][1] if found[best][0] == "undecided" else "")
        if best in wanted:
            wanted.remove(best)
    # Of sets, several ways to write one part are one part.
    for item in wanted:
        if not any(compare(own, item, math, depth + 1)[0] == "right" for own in mine):
            return ("undecided", doubt) if doubt else ("wrong", "other parts")
    return ("undecided", doubt) if doubt else ("right", "same parts")


def _value(text: str) -> str:
    found = assigned(text)
    return found[1] if found else text


def _equations(mine: str, gold: str, math: Math, depth: int) -> Found | None:
    """`x = 1, y = 2` beside `y = 2, x = 1` and `(1, 2)`; `x = 1 or x = 2` beside `1, 2`."""
    named = [_named(text) for text in (mine, gold)]
    if not named[0] and not named[1]:
        return None
    one, other = named
    if one and other:
        if [name for name, _ in one] == [name for name, _ in other] and len(one) == 1:
            return compare(one[0][1], other[0][1], math, depth + 1)
        if {name for name, _ in one} != {name for name, _ in other}:
            return None if len(one) == len(other) == 1 else ("wrong", "other names")
    sides = [_side(found, text) for found, text in zip(named, (mine, gold), strict=True)]
    if sides[0] is None or sides[1] is None:
        return None
    return compare(sides[0], sides[1], math, depth + 1)


def _named(text: str) -> list[tuple[str, str]]:
    """The assignments of a text that is nothing else: `x = 1, y = 2`; `x = 1, 2` gives x twice."""
    if "=" not in text:
        return []
    found: list[tuple[str, str]] = []
    if text.startswith("\\text") and (whole := assigned(text)):
        return [whole]
    whole = assigned(unwrapped(text).strip())
    if whole and whole[0].startswith("("):
        names, values = split(whole[0][1:-1]), parts_of(whole[1])
        return list(zip(names, values.items, strict=True)) if values and len(values.items) == len(names) else []
    for item in split(unwrapped(text).strip()):
        pair = (
            assigned(item)
            if "=" in item
            else (found[0][0], item)
            if found and len({n for n, _ in found}) == 1
            else None
        )
        if pair is None:
            return []
        found.append(pair)
    return found


def _side(found: list[tuple[str, str]], text: str) -> str | None:
    if not found:
        return text if "=" not in text else None
    # x_1 and x_2 are the roots of one equation, in any order.
    if len({name.partition("_")[0] for name, _ in found}) == len(found) > 1:
        return f"({','.join(value for _, value in sorted(found))})"
    return ",".join(value for _, value in found)


def _measured(mine: str, gold: str, math: Math) -> Found:
    r"""As mathematics, where units that end both, like `2\pi cm`, are of one size; degrees are radians where pi is."""
    mine, gold = (_TURN.sub(r"(\1 \\pi/180)", text) if _TRIG.search(text) else text for text in (mine, gold))
    (one, my_unit), (other, their_unit) = _without_unit(mine), _without_unit(gold)
    if not my_unit and not their_unit:
        return math(mine, gold)
    pis = r"\pi" in one, r"\pi" in other
    if (
        pis[0] != pis[1]
        and {my_unit, their_unit} <= {"degree", "", "radian", "rad"}
        and "degree" in (my_unit, their_unit)
    ):
        turned = rf"({one if my_unit == 'degree' else other}) \cdot \frac{{\pi}}{{180}}"
        if (my_unit == "degree") == pis[0]:
            return math(one, other)
        return math(turned, other) if my_unit == "degree" else math(one, turned)
    factor = in_unit(Fraction(1), my_unit, their_unit) if my_unit and their_unit else Fraction(1)
    if not isinstance(factor, Fraction):
        return (
            ("undecided", f"depends on the unit: {my_unit}, {their_unit}")
            if factor is None
            else ("wrong", "other units")
        )
    return math(one if factor == 1 else rf"({one}) \cdot \frac{{{factor.numerator}}}{{{factor.denominator}}}", other)


def _without_unit(text: str) -> tuple[str, str]:
    number = parse_number(text)
    match = _TRAILING_UNIT.fullmatch(text)
    if match is None:
        return text, ""
    unit = unit_of(match[2])
    if not unit or (number is None and "\\" not in match[2] and len(match[2].strip()) == 1):
        return text, ""
    return match[1].strip(), unit
