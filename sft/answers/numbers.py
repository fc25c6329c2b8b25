r"""Numbers as people write them: `1,234.50`, `\frac{3}{4}`, `1 1/2`, `12.5\%`, `3 \times 10^{-5}`, `$5`, `8 km`.

What isn't certainly one number is none: `1,23`, `5x`, `2 million`, `(1,2)`, `3 or 4`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

# Longer ones are left to others: arithmetic here must stay instant on any text.
_LONGEST, _LARGEST_EXPONENT = 300, 400
# A decimal with as many digits as this may stand for a number that it is the rounding of: 0.333333 for 1/3.
_ROUNDED_DIGITS = 6

_INTEGER = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?: \d{3})+|\d+)"
_DECIMAL = rf"(?:{_INTEGER}(?:\.\d*)?|\.\d+)"
_FRACTION = r"\\[dtc]?frac(?:\{(?P<over>[^{}]+)\}\{(?P<under>[^{}]+)\}|\s*(?P<over1>\d)\s*(?P<under1>\d))"
_POWER = r"10\s*(?:\^|\*\*)\s*(?:\{\s*(?P<power>[-+]?\d+)\s*\}|(?P<power1>[-+]?\d+))"
_VALUE = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<currency>\\?[$€£¥])?\s*(?P<sign1>[-+]?)\s*(?:"
    rf"(?:(?P<whole>\d+)\s*)?{_FRACTION}"
    rf"|(?:(?P<whole2>\d+)\s+)?(?P<over2>\d+)\s*/\s*(?P<under2>\d+)"
    rf"|{_POWER}(?![\d.])"
    rf"|(?P<decimal>{_DECIMAL})(?:\s*(?:\\times|\\cdot|[*x])\s*{_POWER.replace('power', 'times')}|[eE](?P<e>[-+]?\d+))?"
    r")(?![\d.,/^!]*\d)(?P<rest>.*)",
    re.ASCII,
)
_ASSIGNED = re.compile(r"[A-Za-z]\s*=\s*(?!=)")
_PERCENT = re.compile(r"\s*(?:\\?%|percent\b|per cent\b)\.?", re.IGNORECASE)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_UNIT = re.compile(r"(?:[A-Za-z]{1,20}(?:\^?\{?[23]\}?)?)(?:(?: |-|/| / )[A-Za-z]{1,20}(?:\^?\{?[23]\}?)?){0,4}")
_DEGREES = re.compile(r"\^?\s*\{?\s*(?:\\circ|\\degree|°)\s*\}?")
_SIGNS = {"$": "dollar", "€": "euro", "£": "pound", "¥": "yen"}
# Short ones that stand for nothing else in plain text; `8m` may be a product, `8 m` is taken as a unit.
_UNITS = frozenset(
    [
        "km",
        "cm",
        "mm",
        "ft",
        "in",
        "yd",
        "mi",
        "kg",
        "mg",
        "lb",
        "lbs",
        "oz",
        "ml",
        "hr",
        "hrs",
        "min",
        "mins",
        "sec",
        "secs",
        "mph",
        "kph",
        "am",
        "pm",
        "hz",
        "khz",
        "pa",
        "kpa",
        "kj",
        "kw",
        "per",
        "of",
    ]
)
_SPACED_UNITS = frozenset(["m", "g", "l", "s", "h"])
_ALIASES = {
    **{"inch": "in", "inches": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi", "pound": "lb"},
    **{"meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm", "centimetre": "cm"},
    **{"gram": "g", "kilogram": "kg", "hour": "hr", "h": "hr", "minute": "min", "second": "sec", "s": "sec"},
}
_SYMBOLS = frozenset(["a", "b", "c", "d", "e", "i", "j", "k", "n", "t", "u", "v", "x", "y", "z", "pi"])
# Words after a number that make it another number, and names of functions and letters.
_SCALES = frozenset(
    [
        "hundred",
        "thousand",
        "million",
        "billion",
        "trillion",
        "dozen",
        "score",
        "tens",
        "hundreds",
        "thousands",
        "millions",
        "billions",
        "trillions",
        "dozens",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "times",
        "over",
        "plus",
        "minus",
        "and",
        "or",
        "to",
        "mod",
        "factorial",
        "squared",
        "cubed",
        "sqrt",
        "infty",
        "sin",
        "cos",
        "tan",
        "cot",
        "sinh",
        "cosh",
        "tanh",
        "arcsin",
        "arccos",
        "arctan",
        "log",
        "exp",
        "max",
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lambda",
        "omicron",
        "rho",
        "sigma",
        "tau",
        "upsilon",
        "omega",
    ]
)
_UNICODE = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "\u00a0": " ", "\u202f": " ", "\u2009": " "})
_SPACES = re.compile(r"\\[,;:! ]|~|\s+")


@dataclass(frozen=True, slots=True)
class Number:
    """A number as it was written.

    Attributes:
        value: before the percent sign, exact.
        places: digits after the decimal point (negative: zeros before it, of 5e3), None for integers and fractions,
            which are no rounding of anything.
        percent: whether a percent sign follows.
        unit: in lower case and singular, empty without one.
    """

    value: Fraction
    places: int | None = None
    percent: bool = False
    unit: str = ""

    @property
    def scaled(self) -> Number:
        """The same without a percent sign: 50% is 0.5."""
        if not self.percent:
            return self
        return Number(self.value / 100, None if self.places is None else self.places + 2, False, self.unit)


@lru_cache(maxsize=256)
def parse_number(text: str) -> Number | None:
    """The number that `text` is, whole, or None. Time is linear in the text, and constant from 300 characters on."""
    if len(text) > _LONGEST:
        return None
    match = _VALUE.fullmatch(_cleaned(text))
    if match is None:
        return None
    part = match.groupdict()
    magnitude = _magnitude(part)
    if magnitude is None or (part["sign"] and part["sign1"]):
        return None
    value, places = magnitude
    rest, percent = _percent(part["rest"])
    unit = _unit(rest)
    if unit is None or (unit and part["currency"]):
        return None
    if part["currency"]:
        unit = _SIGNS[part["currency"].removeprefix("\\")]
    return Number(-value if "-" in (part["sign"], part["sign1"]) else value, places, percent, unit)


def same_number(mine: Number, theirs: Number) -> bool | None:
    """Whether two numbers are equal; None where that depends on what was asked for (other units, 0.5% beside 0.5).

    Exactly equal, or one is a decimal of six digits or more that the other rounds or is cut to. A percent sign on one
    side only is taken as the sign or as the factor, whichever fits: 50% is 50 and 0.5.
    """
    if mine.unit and theirs.unit and mine.unit != theirs.unit:
        return None
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
    if abs(coarse.value * unit) < 10 ** (_ROUNDED_DIGITS - 1):
        return False
    return coarse.value * unit in (round(fine.value * unit), math.trunc(fine.value * unit))


def _cleaned(text: str) -> str:
    """Without what only sets it: math delimiters, thin spaces, braces around commas, a full stop, `x =`."""
    text = text.translate(_UNICODE).strip()
    if len(text) > 1 and text[0] == text[-1] == "$":
        text = text[1:-1]
    text = text.removeprefix("\\(").removesuffix("\\)").removeprefix("\\[").removesuffix("\\]")
    # `10\,000` is one number, and so is `10{,}000`.
    text = re.sub(r"(?<=\d)\\[,!](?=\d)", "", text).replace("{,}", ",").replace(",\\!", ",")
    text = _SPACES.sub(" ", text).strip().removesuffix(".").strip()
    assigned = _ASSIGNED.match(text)
    return text[assigned.end() :] if assigned else text


def _magnitude(part: dict[str, str | None]) -> tuple[Fraction, int | None] | None:
    """(value without its sign, places) of the matched parts."""
    over = part["over"] or part["over1"] or part["over2"]
    if over is not None:
        above, below = _integer(over), _integer(part["under"] or part["under1"] or part["under2"])
        if above is None or not below:
            return None
        whole = int(part["whole"] or part["whole2"] or 0)
        if whole and Fraction(above, below) < 0:
            return None
        return whole + Fraction(above, below), None
    exponent = next((int(part[name] or 0) for name in ("power", "power1", "times", "times1", "e") if part[name]), 0)
    if abs(exponent) > _LARGEST_EXPONENT:
        return None
    digits = (part["decimal"] or "1").replace(",", "").replace(" ", "")
    value = Fraction(digits) * Fraction(10) ** exponent if exponent else Fraction(digits)
    _, point, decimals = digits.partition(".")
    return value, len(decimals) - exponent if point or exponent else None


def _integer(text: str | None) -> int | None:
    text = (text or "").replace(",", "").strip()
    return int(text) if re.fullmatch(r"[-+]?\d+", text, re.ASCII) else None


def _percent(rest: str) -> tuple[str, bool]:
    match = _PERCENT.match(_WRAPPED.sub(r"\1", rest))
    return (_WRAPPED.sub(r"\1", rest)[match.end() :], True) if match else (rest, False)


def _unit(rest: str) -> str | None:
    """The unit that `rest` is: '' for nothing, None for what may be more than a unit."""
    spaced = rest.startswith(" ")
    rest = _DEGREES.sub(" degree ", rest, count=1)
    wrapped = "\\" in rest and not re.sub(r"[\s^{}23/.]", "", _WRAPPED.sub("", rest))
    rest = re.sub(r"\s+", " ", _WRAPPED.sub(r" \1 ", rest)).replace(" ^", "^").strip().removesuffix(".")
    if not rest:
        return ""
    if not _UNIT.fullmatch(rest):
        return None
    words = [word.lower() for word in re.split(r"[ /-]", re.sub(r"\^?\{?[23]\}?", "", rest)) if word]
    if any(word in _SCALES for word in words):
        return None
    # In plain text a short word may be a product of variables.
    plain = _UNITS | _SPACED_UNITS if spaced else _UNITS
    known = all(word not in _SYMBOLS if wrapped else word in plain or _is_word(word) for word in words)
    return " ".join(map(_singular, re.sub(r"[{}^]", "", rest.lower()).split(" "))) if known else None


def _singular(word: str) -> str:
    word = _ALIASES.get(word, word)
    return _ALIASES.get(word.removesuffix("s"), word.removesuffix("s"))


def _is_word(word: str) -> bool:
    return len(word) >= 3 and any(vowel in word for vowel in "aeiou")
