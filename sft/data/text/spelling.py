"""Words that are spelled in more than one way: numbers, units, short forms."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from string import ascii_lowercase

ENDS = frozenset(".?;!")

_NUMBERS = """
    zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
    seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: number for number, word in enumerate(_NUMBERS.split())} | {
    word: 10 * number for number, word in enumerate(_TENS.split(), start=2)
}
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {"half": 2, "halves": 2, "third": 3, "fourth": 4, "quarter": 4, "fifth": 5, "sixth": 6, "seventh": 7} | {
    "eighth": 8, "ninth": 9, "tenth": 10, "thirds": 3, "fourths": 4, "quarters": 4, "fifths": 5, "sixths": 6,
    "sevenths": 7, "eighths": 8, "ninths": 9, "tenths": 10, "hundredths": 100,
}  # fmt: skip

_SINGULAR = """
    dollar cent euro pound ounce ton gram kilogram milligram mile yard meter kilometer centimeter millimeter liter
    milliliter gallon quart pint cup minute hour day week month year degree
"""
# Each: how it is said here, then other ways.
_VARIANTS = """
    inch:inches foot:feet,ft yard:yd,yds quart:qt mile:mi kilometer:km,kms,kilometre,kilometres meter:metre,metres
    centimeter:cm,centimetre,centimetres millimeter:mm,millimetre,millimetres liter:litre,litres
    milliliter:ml,millilitre,millilitres kilogram:kg,kgs milligram:mg pound:lb,lbs ounce:oz gallon:gal hour:hr,hrs
    minute:mins seconds:secs year:yr,yrs week:wk,wks dollar:bucks,buck,usd rupee:rupees percent:pct ok:okay
"""
_VERBS = "do does did is are was were has have had would could should"
_OTHERWISE: dict[str, tuple[str, ...]] = {
    **{f"{unit}s": (unit,) for unit in _SINGULAR.split()},
    **{other: (name,) for entry in _VARIANTS.split() for name, *others in [re.split("\\W", entry)] for other in others},
    **{f"{verb}nt": (verb, "not") for verb in _VERBS.split()},
    **{verb: ("find",) for verb in ("compute", "calculate", "determine", "evaluate")},
    "cant": ("can", "not"),
    "cannot": ("can", "not"),
    "wont": ("will", "not"),
    "twice": ("2", "times"),
    "thrice": ("3", "times"),
    **{word: ("2", "times") for word in ("double", "doubles", "doubled")},
    **{word: ("3", "times") for word in ("triple", "triples", "tripled")},
    "mph": ("mile", "per", "hour"),
    "kph": ("kilometer", "per", "hour"),
}  # fmt: skip
# What a letter or two mean behind a number.
_UNITS = {"h": "hour", "m": "meter", "g": "gram", "l": "liter", "min": "minute", "s": "seconds", "sec": "seconds"}
_PAIRS = {("per", "cent"): "percent", ("what", "is"): "find", ("what", "are"): "find", ("left", "over"): "left"}
# Words on which a problem turns: with another of them in its place the answer is another. Of opposites one is enough
# where the other has synonyms (sold, but not bought).
_TURNING_WORDS = """
    not no none never without except neither nor only either most more higher lower taller shorter longer older
    younger faster slower cheaper highest lowest tallest shortest longest oldest youngest third quarter fourth fifth
    sixth quadruple dozen hundred thousand million billion first second last next previous before after until
    since between above below over under up down right even odd prime composite positive negative nonnegative
    increasing decreasing increase decrease increases decreases increased decreased sum difference product quotient
    ratio median mode range remainder perimeter area volume circumference radius diameter height width
    length base surface sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp lcm gcd floor ceil
    lfloor rfloor lceil rceil sine cosine tangent seconds minute hour day week month year daily weekly monthly
    yearly inch foot yard mile meter kilometer centimeter millimeter gram kilogram milligram pound ounce ton liter
    milliliter gallon quart pint cup cent penny pennies nickel nickels dime dimes dollar euro yen rupee percent
    degree radians monday tuesday wednesday thursday friday saturday sunday january february march april may june
    july august september october november december morning afternoon evening night yesterday today tomorrow true
    false add subtract multiply divide multiplied divided plus minus times north south east west lose loses lost
    sell sells sold took save saves saved far other frac binom overline underline vec hat bar mod bmod pmod
"""
# Those that mean one and the same.
_SAME_TURNS = """
    larger bigger greater; largest biggest greatest maximum max; smallest least minimum min fewest; less fewer;
    receive receives received get gets got; left remain remains remained remaining leftover; each every; mean average
"""
MEANS = {word: words.split()[0] for words in _SAME_TURNS.split(";") for word in words.split()}
TURNING = frozenset(_TURNING_WORDS.split()) | frozenset(MEANS)
# What a slip makes of a number's name: a letter doubled, left out, swapped with the next or (of longer names) replaced.
_OTHER_WORDS = """
    for fur our tree there thee threw shree even seen sven sever hal fie ive zeo nie twine fifth sixth forth fort forts
    dozed fity
"""


def _slips(name: str) -> Iterator[str]:
    for place in range(1, len(name)):
        yield name[:place] + name[place - 1 :]
        yield name[:place] + name[place + 1 :]
        yield name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
        if len(name) > 4:
            yield from (name[:place] + letter + name[place + 1 :] for letter in ascii_lowercase)


_MISSPELT = {
    slip: name
    for name in (*_SMALL, *_SCALES, "half", "twice", "double")
    if len(name) > 3
    for slip in _slips(name)
    if slip not in _OTHER_WORDS.split() and slip not in _SMALL and slip not in _PARTS and len(slip) > 2
}
_SPELLED = frozenset().union(_UNITS, _SMALL, _SCALES, _PARTS, _OTHERWISE, _MISSPELT, (first for first, _ in _PAIRS))


def plain_words(tokens: Sequence[str]) -> list[str]:
    """`tokens` with one spelling for all, without the ends of sentences: `two hundred and five` is `205`, `half` is
    `1 / 2`, `hrs` is `hour`, and `what is` is `find`."""
    if _SPELLED.isdisjoint(tokens):
        return [token for token in tokens if token not in ENDS]
    if not _MISSPELT.keys().isdisjoint(tokens):
        tokens = [_MISSPELT.get(token, token) for token in tokens]
    result: list[str] = []
    place = 0
    while place < len(tokens):
        token = tokens[place]
        if token in _SMALL or token in _SCALES:
            place = _number(tokens, place, result)
            continue
        place += 1
        if token not in _SPELLED:
            if token not in ENDS:
                result.append(token)
            continue
        after = tokens[place] if place < len(tokens) else ""
        if token in _PARTS:
            result += _part(token, after, result)
        elif (pair := _PAIRS.get((token, after))) is not None:
            result.append(pair)
            place += 1
        elif token in _UNITS and result and result[-1].isdecimal():
            result.append(_UNITS[token])
        else:
            result += _OTHERWISE.get(token, (token,))
    return result


def _part(word: str, after: str, before: list[str]) -> list[str]:
    """A fraction's name as its numbers; of what `before` ends with, what belongs to it is taken away."""
    last, of = before[-1] if before else "", after in ("of", "as")
    if (last == "1" or (last.isdecimal() and word.endswith("s"))) and (of or word != "quarters"):
        return ["/", str(_PARTS[word])]
    if word != "half" and not (of and last == "a"):
        return [word]
    if last == "a":
        before.pop()
        if len(before) > 1 and before[-1] == "and" and before[-2].isdecimal():
            before.pop()
    return ["1", "/", str(_PARTS[word])]


def _number(tokens: Sequence[str], place: int, result: list[str]) -> int:
    """Append the number that begins at `place`, or its word where it is none; where the text goes on."""
    total, current = 0, _SMALL.get(tokens[place])
    if current is None:
        current = _scaled(result, tokens[place])
        if current is None:
            result.append(tokens[place])
            return place + 1
    place += 1
    while place < len(tokens):
        token = tokens[place]
        small, scale = _SMALL.get(token), _SCALES.get(token)
        if small is not None and _fits(small, total, current):
            current += small
        elif scale is not None and current and (scale >= 1000 or current < 100):
            total, current = (total + current * scale, 0) if scale >= 1000 else (total, current * scale)
        elif not (token == "and" and _goes_on(tokens, place)):
            break
        place += 1
    result.append(str(total + current))
    return place


def _scaled(result: list[str], word: str) -> int | None:
    """The value of a scale after what `result` ends with, which is taken away; None where that is no number."""
    last, scale = result[-1] if result else "", _SCALES[word]
    if last == "a":
        result.pop()
        if result[-3:] == ["1", "/", "2"]:
            del result[-3:]
            return scale // 2
        return scale
    whole, _, part = last.partition(".")
    if not (whole + part).isdecimal() or len(last) > 15 or scale % 10 ** len(part):
        return None
    result.pop()
    return int(whole + part) * (scale // 10 ** len(part))


def _fits(small: int, total: int, current: int) -> bool:
    """Whether `small` may follow in the same number: `twenty` + `five`, `hundred` + `twelve`, never `two` + `three`."""
    return (current % 100 == 0 and total + current > 0) or (current % 10 == 0 and current % 100 > 10 and 0 < small < 10)


def _goes_on(tokens: Sequence[str], place: int) -> bool:
    """Whether `and` at `place` is within a number: `two hundred and five thousand`, not `two hundred and 5 hundred`."""
    before, after = tokens[place - 1], place + 1
    if before not in _SCALES or before == "dozen" or after == len(tokens) or tokens[after] not in _SMALL:
        return False
    while after < len(tokens) and tokens[after] in _SMALL:
        after += 1
    follows = tokens[after] if after < len(tokens) else ""
    if follows not in _SCALES:
        return True
    return _SCALES[follows] >= 1000 if before == "hundred" else follows == "hundred"
