"""Units after a number, and which of them can be converted; Pint knows their sizes."""

from __future__ import annotations

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from sft.answers.normal import WRAPPED

SIGNS = {"$": "dollar", "€": "euro", "£": "pound_sterling", "¥": "yen", "₹": "rupee", "Rs": "rupee", "USD": "dollar"}
SIGNS |= {"EUR": "euro", "US$": "dollar", "¢": "cent"}
_MONEY = """
dollar = [money_dollar] = _ = USD = usd = buck; cent = dollar / 100 = _ = penny = pennies
euro = [money_euro] = _ = EUR; pound_sterling = [money_pound] = _ = GBP; pence = pound_sterling / 100
rupee = [money_rupee] = _ = INR = Rs; paisa = rupee / 100 = _ = paise; yen = [money_yen] = _ = JPY
"""
_WORD = r"[A-Za-z]{1,20}\.?(?:\^?\{?[23]\}?)?"
_UNIT = re.compile(rf"{_WORD}(?:(?: |-|/| / |\*){_WORD}){{0,4}}")
_DEGREES = re.compile(r"\^\\circ\s?([CF](?![A-Za-z]))?")
_RAISED, _UNDER = re.compile(r"\^\{(-?\d)\}"), re.compile(r"[ *]{0,3}\b([A-Za-z]+)(\^-[123])")
_MICRO = re.compile(r"(?:\\mu|\u03bc)\s?(\\(?:text|mathrm)\{)?(?=[A-Za-z])")
_OLD = re.compile(r" old$|degrees? (?=[Cc]elsius|[Ff]ahrenheit)")
_DEGREE = {None: " degree ", "C": " celsius ", "F": " fahrenheit "}
# Short ones that stand for nothing else in plain text; `8m` may be a product, `8 m` is taken as a unit.
_SHORT = set(
    """km cm mm um nm ft in yd mi kg mg lb lbs oz ml mL hr hrs min mins sec secs mph kph Hz kHz Pa kPa kJ kW kWh per of
    USD EUR GBP INR rad deg gal sq cu hp""".split()
)
_SPACED = _SHORT | set("m g l L s h J N W V A K".split())
_SYMBOLS = set("a b c d e i j k n t u v x y z pi".split())
# Words after a number that make it another number, and names of functions and letters.
_NO_UNITS = set(
    """hundred thousand million billion trillion dozen score tens hundreds thousands millions billions trillions dozens
    lakh crore lakhs crores
    half halves third thirds quarter quarters times over plus minus and or to mod factorial squared cubed sqrt infty
    sin cos tan cot sinh cosh tanh arcsin arccos arctan log exp max alpha beta gamma delta epsilon zeta eta theta iota
    kappa lambda omicron rho sigma tau upsilon omega base not zero one two three four five six
    seven eight nine ten eleven twelve twenty thirty forty fifty sixty seventy eighty ninety""".split()
)
_ALIASES = {"sq": "square", "cu": "cubic", "gm": "g", "kmph": "km/h", "kph": "km/h", "hrs": "hour", "mins": "minute"}
_ALIASES |= {"secs": "second", "lbs": "lb", "feet": "foot", "inches": "inch", "people": "person", "children": "child"}


def unit_of(rest: str) -> str | None:
    """The unit that follows a number: '' for nothing, None for what may be more than a unit."""
    spaced = rest.startswith(" ")
    rest = _MICRO.sub(r"\1u", _DEGREES.sub(lambda m: _DEGREE[m[1]], rest, count=1).replace(r"\Omega", " ohm"))
    rest = _RAISED.sub(r"^\1", rest).replace(r"\cdot", "*")
    wrapped = "\\" in rest and not re.sub(r"[\s^123/.*-]", "", WRAPPED.sub("", rest))
    rest = " ".join(WRAPPED.sub(r" \1 ", rest).split()).replace(" ^", "^")
    rest = _UNDER.sub(lambda m: f"/{m[1]}{m[2].replace('^-1', '').replace('-', '')}", rest)
    rest = _OLD.sub("", rest)
    if not rest:
        return ""
    if rest in SIGNS:
        return SIGNS[rest]
    if not _UNIT.fullmatch(rest):
        return None
    words = [word for word in re.split(r"[ /*-]", re.sub(r"\^?[23]|\.", "", rest)) if word]
    if not words or any(word.lower() in _NO_UNITS for word in words):
        return None
    known = all(
        word not in _SYMBOLS if wrapped else word in (_SPACED if spaced else _SHORT) or _is_word(word) for word in words
    )
    if not known:
        return None
    rest = re.sub(r"(?<=[A-Za-z])([23])", r"^\1", rest.replace("^", "").replace(".", "").replace("-", " "))
    return re.sub(r"[A-Za-z]+", lambda word: _singular(word[0]), rest)


def in_unit(value: Fraction, unit: str, other: str) -> Fraction | bool | None:
    """`value` in another unit; False where they measure different things, None where one of them isn't known."""
    if unit == other:
        return value
    pair = {unit, other}
    if "pound_sterling" in pair and "pound" in pair:
        return value
    mine, theirs = _known(unit), _known(other)
    if mine is None or theirs is None:
        return None
    if mine.dimensionality != theirs.dimensionality:
        return False
    return Fraction(_registry().Quantity(Fraction(value), mine).to(theirs).magnitude)


@lru_cache(maxsize=1)
def _registry() -> Any:
    import pint

    registry: Any = pint.UnitRegistry(non_int_type=Fraction, autoconvert_offset_to_baseunit=True)
    for line in _MONEY.replace(";", "\n").strip().splitlines():
        registry.define(line.strip())
    return registry


@lru_cache(maxsize=256)
def _known(unit: str) -> Any:
    """Pint's unit, or None."""
    import pint

    for text in (unit, unit.lower()):
        try:
            return _registry().parse_units(text)
        except (pint.PintError, TypeError, ValueError, AttributeError):
            continue
    return None


def _singular(word: str) -> str:
    word = word.lower() if len(word) > 3 else word
    word = _ALIASES.get(word, word)
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us")):
        word = word.removesuffix("s")
    return _ALIASES.get(word, word)


def _is_word(word: str) -> bool:
    return len(word) >= 3 and any(vowel in word.lower() for vowel in "aeiou")
