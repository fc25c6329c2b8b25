r"""Numbers as people write them: `1,234.50`, `1 1/2`, `12.5\%`, `3 \times 10^{-5}`, `$5`, `8 km`, `101_2`, `three`.

What isn't certainly one number is none: `5x`, `2 pi`, `(1,2)`, `3 or 4`.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache

from sft.answers.normal import WRAPPED, normal, unwrapped
from sft.answers.units import SIGNS, in_unit, unit_of

# Longer ones are left to others: arithmetic here must stay instant on any text.
_LONGEST, _LARGEST_EXPONENT = 300, 400
# A decimal with as many digits and places as this may stand for a number that it is the rounding of: 0.333333 for 1/3.
_ROUNDED_DIGITS, _ROUNDED_PLACES = 6, 5

_DECIMAL = r"(?:\d{1,3}(?:[ ']\d{3})+(?!\d)(?:[.,]\d+)?|\d[\d.,]*|\.\d+)(?<![.,])"
_FRACTION = r"\\frac\s?\{(?P<over>[^{}]+)\}\s?\{(?P<under>[^{}]+)\}"
_POWER = r"10\s?(?:\^|\*\*)\s?(?:\{\s?(?P<power>[-+]?\d+)\s?\}|(?P<power1>[-+]?\d+))"
_TIMES = r"\s?(?:\\times|\\cdot|[*x])\s?"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?|minus |negative )\s?(?P<currency>(?:US)?\$|[€£¥₹]|Rs\.? |USD |EUR )?\s?(?P<sign1>[-+]?)\s?(?:"
    rf"(?:(?P<whole>\d+)(?: and)?\s?)?{_FRACTION}"
    rf"|(?:(?P<whole2>\d+)(?: and)? )?(?P<over2>\d[\d,]*)\s?/\s?(?P<under2>\d[\d,]*)"
    rf"|{_POWER}(?![\d.])"
    r"|(?P<before>\d*)\.(?P<once>\d*)"
    r"(?:\\overline\s?\{?(?P<again>\d+)\}?|\((?P<again1>\d+)\))"
    r"|(?P<lead>\d*)\.(?P<shown>\d{2,40})(?:\.\.\.|\s?\\[lc]?dots)"
    r"|[({]?(?P<digits>[0-9][0-9A-Fa-f]{0,99}|[A-F][0-9A-F]{1,99}(?=[\s)}_{]{1,5}16))[)}]?"
    r"(?:_\s?\{?\s?\(?(?:base ?)?|,? ?\(?(?:in )?base[ -]?)(?P<base>\d\d?|[a-z]+)\s?\)?\}?(?![\d])"
    rf"|(?P<decimal>{_DECIMAL})"
    rf"(?:{_TIMES}{_POWER.replace('power', 'times')}|[eE](?P<e>[-+]?\d+))?"
    r")(?![\d/!_]|[.,]\d|\^(?!\\circ))(?P<rest>.*)",
    re.ASCII,
)
# How thousands and decimals are told apart; what may be either.
_GROUPED = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?|[1-9]\d?(?:,\d\d)+,\d{3}(?:\.\d*)?", re.ASCII)
_EUROPEAN = re.compile(r"[1-9]\d{0,2}(?:(?:\.\d{3}){2,}|(?:\.\d{3})+,\d+)", re.ASCII)
_UNSURE = re.compile(r"[1-9]\d{0,2}[.,]\d{3}", re.ASCII)
_ASSIGNED = re.compile(r"[A-Za-z]\s?=\s?(?!=)")
_PERCENT = re.compile(r"\s*(?:%|(?:percent|per cent|percentage)\b)\.?", re.IGNORECASE)
_PAIR = re.compile(r"[$€£]\d[\d.,]*|\d[\d.,]*(?: \d+/\d+)? ?[A-Za-z]{1,20}\.?")
_PAIRS = re.compile(rf"(?:{_PAIR.pattern})(?:,? (?:and )?(?:{_PAIR.pattern})){{1,4}}")
_PREFIXES = {"0x": 16, "0b": 2, "0o": 8}
_PREFIXED = re.compile(r"\b(0[xbo])([0-9A-Fa-f]+)\b", re.ASCII)
_ARTICLE = re.compile(r"^ (?:of )?an? ")
_FEET = re.compile(r"(\d+)' ?(\d+)(?:\"|'')")
_ARC = re.compile(r"(\d+)\s?\^\\circ ?(\d+)'(?: ?(\d+)(?:\"|''))?")

_WORDS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
_SMALL = {word: value for value, word in enumerate(_WORDS.split())}
_SMALL |= {w: 10 * v for v, w in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12}
_SCALES |= {"lakh": 10**5, "crore": 10**7}
_PARTS = {word: v for v, word in enumerate("half third quarter fifth sixth seventh eighth ninth tenth".split(), 2)}
_PARTS |= {"halve": 2, "fourth": 4, "hundredth": 100}
_SCALE = re.compile(rf"\s?(?P<scale>{'|'.join(_SCALES)})s?\b")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written.

    Attributes:
        value: before the percent sign, exact.
        places: digits after the decimal point (negative: zeros before it, of 5e3), None for integers and fractions,
            which are no rounding of anything.
        percent: whether a percent sign follows.
        unit: as `units.unit_of` writes it, empty without one.
        other: what else it may be: 1,234 is 1.234 where a comma is the decimal point; 101_2 is 101 that lost its base.
        based: whether its base was written.
        listed: whether it may be two numbers: `3,5`.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: str = ""
    other: Fraction | None = None
    based: bool = False
    listed: bool = False

    @property
    def scaled(self) -> Number:
        """The same without a percent sign: 50% is 0.5."""
        if not self.percent:
            return self
        return replace(
            self, value=self.value / 100, places=None if self.places is None else self.places + 2, percent=False
        )


@lru_cache(maxsize=256)
def parse_number(text: str) -> Number | None:
    """The number that `text` is, whole, or None. Time is linear in the text, and constant from 300 characters on."""
    if len(text) > _LONGEST:
        return None
    text = _PREFIXED.sub(lambda m: f"{m[2].upper()}_{_PREFIXES[m[1]]}", normal(text))
    text = _ARC.sub(lambda m: f"{m[1]} degree {m[2]} arcminute" + (f" {m[3]} arcsecond" if m[3] else ""), text)
    text = _FEET.sub(r"\1 ft \2 in", text)
    assigned = _ASSIGNED.match(text)
    text = text[assigned.end() :] if assigned else text
    plain = " ".join(unwrapped(text).split())
    return _one(text) or _one(plain) or _sum(plain)


def same_number(mine: Number, theirs: Number) -> bool | None:
    """Whether two numbers are equal; None where that depends on what was asked for.

    Exactly equal, or one is a decimal of six digits or more that the other rounds or is cut to. A percent sign on one
    side only is taken as the sign or as the factor, whichever fits: 50% is 50 and 0.5. A unit on one side only is fine;
    two are converted; of words that are no known units nothing is known.
    """
    same = _same(mine, theirs)
    other_mine = mine.other is not None and _same(replace(mine, value=mine.other), theirs)
    other_theirs = theirs.other is not None and _same(mine, replace(theirs, value=theirs.other))
    return None if same is False and (other_mine or other_theirs) and not (mine.based and theirs.based) else same


def _same(mine: Number, theirs: Number) -> bool | None:
    if mine.unit and theirs.unit and mine.unit != theirs.unit:
        converted = in_unit(mine.value, mine.unit, theirs.unit)
        if converted is None:
            return None if _equal(mine, theirs) else False
        return _equal(Number(converted), theirs) if isinstance(converted, Fraction) else False
    if mine.percent != theirs.percent and (theirs.unit if mine.percent else mine.unit):
        return False
    if mine.percent == theirs.percent:
        return _equal(mine, theirs)
    if _equal(mine.scaled, theirs.scaled):
        return True
    if not _equal(mine, theirs):
        return False
    # 0.5% beside 0.5 may be the sign left out, or a mistake by a factor of a hundred.
    return True if abs(mine.value) >= 1 else None


def _equal(mine: Number, theirs: Number) -> bool:
    if mine.value == theirs.value:
        return True
    decimals = [number for number in (mine, theirs) if number.places is not None]
    if not decimals:
        return False
    coarse = min(decimals, key=lambda number: number.places or 0)
    fine = theirs if coarse is mine else mine
    unit = Fraction(10) ** (coarse.places or 0)
    if (coarse.places or 0) < _ROUNDED_PLACES or abs(coarse.value * unit) < 10 ** (_ROUNDED_DIGITS - 1):
        return False
    return coarse.value * unit in (round(fine.value * unit), math.trunc(fine.value * unit))


def _one(text: str) -> Number | None:
    match = _VALUE.fullmatch(text)
    if match is None:
        return _spoken(text)
    part = match.groupdict()
    found = _magnitude(part)
    if found is None or (part["sign"] and part["sign1"]):
        return None
    scale = _SCALE.match(part["rest"])
    factor = (-1 if part["sign"] not in ("", "+") or part["sign1"] == "-" else 1) * (
        _SCALES[scale["scale"]] if scale else 1
    )
    places = None if scale else found.places
    other = None if found.other is None else found.other * factor
    number = replace(found, value=found.value * factor, other=other, places=places)
    return _measured(number, part["rest"][scale.end() :] if scale else part["rest"], part["currency"]) or _spoken(text)


def _spoken(text: str) -> Number | None:
    """`twenty-one`, `three and a half hours`."""
    words = text.split()
    for count in range(min(len(words), 12), max(len(words) - 4, 0), -1):
        value = _worded(" ".join(words[:count]))
        if value is not None:
            return _measured(Number(value), _ARTICLE.sub(" ", "".join(f" {word}" for word in words[count:])), None)
    return None


def _measured(number: Number, rest: str, currency: str | None) -> Number | None:
    """The number with the percent sign or the unit that follows it; None where more follows."""
    percent = _PERCENT.match(WRAPPED.sub(r"\1", rest))
    unit = unit_of(WRAPPED.sub(r"\1", rest)[percent.end() :] if percent else rest)
    sign = SIGNS[currency.rstrip(". ")] if currency else ""
    if unit is None or (unit and sign and in_unit(Fraction(1), unit, sign) != 1):
        return None
    return replace(number, percent=percent is not None, unit=sign or unit)


def _sum(text: str) -> Number | None:
    """`2 hours 30 minutes`, `$3 and 50 cents`, in the first one's unit."""
    if not _PAIRS.fullmatch(text):
        return None
    numbers = [_one(pair.replace("h", " hours") if pair[-1] == "h" else pair) for pair in _PAIR.findall(text)]
    first = numbers[0]
    total, sizes = Fraction(0), list[Fraction]()
    for number in numbers:
        if number is None or first is None or not number.unit or number.percent:
            return None
        value = in_unit(number.value, number.unit, first.unit)
        size = in_unit(Fraction(1), number.unit, first.unit)
        if not isinstance(value, Fraction) or not isinstance(size, Fraction):
            return None
        total, sizes = total + value, [*sizes, size]
    # Each smaller than the one before: `5 cm 3 m` is a list.
    return Number(total, unit=first.unit) if first and sizes == sorted(set(sizes), reverse=True) else None


def _magnitude(part: dict[str, str | None]) -> Number | None:
    """The matched parts without sign and unit."""
    over = part["over"] or part["over2"]
    if over is not None:
        above, below = _integer(over), _integer(part["under"] or part["under2"])
        if above is None or not below:
            return None
        whole = int(part["whole"] or part["whole2"] or 0)
        return None if whole and Fraction(above, below) < 0 else Number(whole + Fraction(above, below))
    again = part["again"] or part["again1"]
    if again:
        return Number(_repeating(part["before"] or "0", part["once"] or "", again))
    if part["shown"]:
        return _shown(part["lead"] or "0", part["shown"])
    if part["base"]:
        return _based(part["digits"] or "", part["base"])
    exponent = next((int(part[name] or 0) for name in ("power", "power1", "times", "times1", "e") if part[name]), 0)
    return None if abs(exponent) > _LARGEST_EXPONENT else _decimal(part["decimal"] or "1", exponent)


def _decimal(text: str, exponent: int) -> Number | None:
    plain, other, listed = text.replace(" ", "").replace("'", ""), None, False
    if _UNSURE.fullmatch(plain):
        other = Fraction(plain.replace(",", ".") if "," in plain else plain.replace(".", ""))
    if _GROUPED.fullmatch(plain):
        plain = plain.replace(",", "")
    elif _EUROPEAN.fullmatch(plain):
        plain = plain.replace(".", "").replace(",", ".")
    elif plain.count(",") == 1 and "." not in plain and not plain.startswith(","):
        plain, listed = plain.replace(",", "."), plain == text
    if "," in plain or plain.count(".") > 1:
        return None
    value = Fraction(plain) * Fraction(10) ** exponent if exponent else Fraction(plain)
    _, point, decimals = plain.partition(".")
    return Number(value, len(decimals) - exponent if point or exponent else None, other=other, listed=listed)


def _repeating(before: str, once: str, again: str) -> Fraction:
    return Fraction(int(before + once + again) - int(before + once), 10 ** len(once) * (10 ** len(again) - 1))


def _shown(before: str, digits: str) -> Number | None:
    """`0.1666...`: what ends in the same digits at least twice, three times of one."""
    for size in range(1, len(digits) // 2 + 1):
        times = 3 if size == 1 else 2
        if len(digits) >= times * size and digits.endswith(digits[-size:] * times):
            return Number(_repeating(before, digits[: -times * size], digits[-size:]))
    return None


def _based(digits: str, base: str) -> Number | None:
    size = int(base) if base.isdigit() else _SMALL.get(base, 0)
    try:
        value = int(digits, size) if 2 <= size <= 36 else None
    except ValueError:
        return None
    return (
        None
        if value is None
        else Number(Fraction(value), other=Fraction(digits) if digits.isdigit() else None, based=True)
    )


def _integer(text: str | None) -> int | None:
    text = (text or "").replace(",", "").strip()
    return int(text) if re.fullmatch(r"[-+]?\d+", text, re.ASCII) else None


def _worded(text: str) -> Fraction | None:
    """`twenty-one`, `three and a half`, `two thirds`, `minus five`, and Chinese numerals."""
    words = text.casefold().replace("-", " ").split()
    negative = bool(words) and words[0] in ("minus", "negative")
    if not text.isascii():
        return _chinese(text)
    words = words[negative:]
    if words in (["first"], ["second"]):
        return Fraction(["first", "second"].index(words[0]) + 1)
    if "point" in words:
        place = words.index("point")
        return _with_decimals(_counted(words[:place]), [_SMALL.get(word) for word in words[place + 1 :]], negative)
    part = _PARTS.get(words[-1].removesuffix("s")) if words else None
    if not part:
        value = _counted(words)
        return value if value is None or not negative else -value
    head = words[:-1]
    cut = len(head) - 1 - head[::-1].index("and") if "and" in head else 0
    whole = _counted(head[:cut]) if cut else Fraction(0)
    over = Fraction(1) if head[cut + (cut > 0) :] in ([], ["a"], ["an"]) else _counted(head[cut + (cut > 0) :])
    return None if whole is None or over is None else (-1 if negative else 1) * (whole + over / part)


def _counted(words: list[str]) -> Fraction | None:
    total = section = digit = 0
    seen = False
    for place, word in enumerate(words):
        scale = _SCALES.get(word) or (_numeral(word) if (_numeral(word) or 0) >= 10 else None)
        small = int(word) if word.isdecimal() and len(word) <= 3 else _SMALL.get(word, _numeral(word))
        if word in ("and", "a") and place + 1 < len(words) and (word == "a") == (not seen):
            continue
        if scale and (scale > 1000 or word == "thousand"):
            total, section, digit = total + (section + digit or 1) * scale, 0, 0
        elif scale:
            section, digit = section + (digit or 1) * scale, 0
        elif small is None or (digit and (digit % 10 or digit < 20 or small > 9)) or (seen and word == "zero"):
            return None
        else:
            digit += small
        seen = True
    return Fraction(total + section + digit) if seen else None


def _chinese(text: str) -> Fraction | None:
    """`四十二`, `三分之一`, `三点五`, `负三`."""
    sign, text = (-1, text[1:]) if text[:1] in ("负", "負") else (1, text.replace("两", "二"))
    under, fraction, over = text.partition("分之")
    whole, point, decimals = text.replace("點", "点").partition("点")
    if fraction:
        above, below = _counted(list(over)), _counted(list(under))
        return sign * above / below if above is not None and below else None
    if not point:
        return None if (value := _counted(list(whole))) is None else sign * value
    return _with_decimals(_counted(list(whole)), [_numeral(character) for character in decimals], sign < 0)


def _with_decimals(whole: Fraction | None, decimals: list[int | None], negative: bool) -> Fraction | None:
    digits = [digit for digit in decimals if digit is not None and digit < 10]
    if whole is None or not digits or len(digits) < len(decimals):
        return None
    return (-1 if negative else 1) * (whole + sum(Fraction(d, 10**place) for place, d in enumerate(digits, start=1)))


def _numeral(character: str) -> int | None:
    """The value of a Chinese numeral."""
    value = unicodedata.numeric(character, -1) if len(character) == 1 and not character.isascii() else -1
    return int(value) if value >= 0 and value == int(value) else None
