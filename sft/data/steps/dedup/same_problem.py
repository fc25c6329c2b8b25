"""Whether two nearly equal problems are one problem in other words, or two problems.

A changed number, sign, variable, unit or word such as `more` makes another problem; a typo, a synonym or another name
throughout doesn't. English words only: in other languages numbers and formulas still count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from difflib import SequenceMatcher

# Numbers, signs and variables; `a` and `i` are words more often.
_FORMULA = re.compile(r"\d.*|\W|[b-hj-z]")

# Words on which a problem turns: with another of them in its place the answer is another. Of opposites one is enough
# where the other has synonyms (sold, but not bought).
_TURNING_WORDS = """
    not no none never without except neither nor only all either least most fewest more less fewer greater
    larger bigger smaller higher lower taller shorter longer older younger faster slower cheaper greatest
    largest biggest smallest highest lowest tallest shortest longest oldest youngest maximum minimum max min
    half third quarter fourth fifth sixth twice thrice double triple quadruple dozen hundred thousand million
    billion first second last next previous before after until since between above below over under up down
    right even odd prime composite positive negative nonnegative increasing decreasing increase decrease
    increased decreased sum difference product quotient ratio mean median mode average range remainder perimeter
    area volume circumference radius diameter height width length base surface sin cos tan cot sec csc arcsin
    arccos arctan sinh cosh tanh log ln exp lcm gcd floor ceil lfloor rfloor lceil rceil sine cosine tangent
    seconds minute minutes hour hours day days week weeks month months year years daily weekly monthly yearly
    inch inches foot feet yard yards mile miles meter meters metre metres kilometer kilometers centimeter
    centimeters millimeter millimeters cm mm km kg gram grams kilogram kilograms pound pounds ounce ounces ton
    tons liter liters litre litres milliliter milliliters gallon gallons quart quarts pint pints cup cups cent
    cents penny pennies nickel nickels dime dimes dollar dollars percent degrees radians monday tuesday
    wednesday thursday friday saturday sunday january february march april may june july august september
    october november december morning afternoon evening night yesterday today tomorrow true false add subtract
    multiply divide multiplied divided plus minus times north south east west lose loses lost receive receives
    received sell sells sold
"""
_TURNING = frozenset(_TURNING_WORDS.split())
# Words that come and go with the style of a sentence, wherever they stand.
_FUNCTION_WORDS = """
    a an the this that these those there here it its he she they them his her their him you your we our us i my
    me is are was were be been being am do does did done have has had having will would can could shall should
    might must of in on at to for from by with into onto as and or but so if then than when while where which
    who whom whose what how much also just very too well now such per about total altogether together overall s
    t
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split()) - _TURNING


def formulas(tokens: Sequence[str]) -> list[str]:
    """The tokens (of `sft.data.text.normalize.tokens`) that two wordings of one problem share, in their order: numbers,
    signs and variables."""
    return [token for token in tokens if _FORMULA.fullmatch(token)]


def same_problem(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two nearly equal problems, as tokens, ask the same."""
    if formulas(one) != formulas(other):
        return False
    spelled = _spelled_alike(one, other)
    return _turning(one) == _turning(spelled) and _same_roles(_content(one), _content(spelled))


def _turning(tokens: Sequence[str]) -> list[str]:
    return [token for token in tokens if token in _TURNING]


def _spelled_alike(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """`other` with words spelled as in `one` where that differs by a slip; the word on which it turns is never one."""
    result = list(other)
    here, there = set(one), set(other)
    blocks = SequenceMatcher(a=one, b=other, autojunk=False).get_opcodes()
    for kind, start, end, begin, stop in blocks:
        if kind != "replace" or end - start != stop - begin:
            continue
        for place, (word, variant) in enumerate(zip(one[start:end], other[begin:stop], strict=True), start=begin):
            known = (word in _TURNING and variant in _TURNING) or (variant in here and word in there)
            if not known and _is_slip(word, variant):
                result[place] = word
    return result


def _is_slip(word: str, variant: str) -> bool:
    """Whether one letter was left out, doubled, replaced or swapped with its neighbour, after the first."""
    longer, shorter = sorted((word, variant), key=len, reverse=True)
    if len(longer) < 4 or len(longer) - len(shorter) > 1 or word[0] != variant[0]:
        return False
    same = next((place for place, (a, b) in enumerate(zip(word, variant, strict=False)) if a != b), len(shorter))
    if len(longer) > len(shorter):
        return longer[same + 1 :] == shorter[same:]
    swapped = word[same : same + 2] == variant[same : same + 2][::-1] and word[same + 2 :] == variant[same + 2 :]
    return swapped or word[same + 1 :] == variant[same + 1 :]


def _content(tokens: Sequence[str]) -> list[str]:
    return [token for token in tokens if token not in _FUNCTION]


def _same_roles(one: list[str], other: list[str]) -> bool:
    """False when a word of the text has come to stand where another stood, as the names in `How many has Tom?`.

    A word that both texts have, but one more often, must have given way to a new word (a typo, a synonym); words that
    both have equally often must come in the same order.
    """
    here, there = Counter(one), Counter(other)
    for more, fewer in ((here, there), (there, here)):
        again = sum(count - fewer[word] for word, count in more.items() if 0 < fewer[word] < count)
        new = sum(count for word, count in fewer.items() if word not in more)
        if again > new:
            return False
    steady = {word for word, count in here.items() if there[word] == count}
    return [word for word in one if word in steady] == [word for word in other if word in steady]
