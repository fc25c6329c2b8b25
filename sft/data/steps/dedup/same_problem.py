"""Whether two nearly equal problems are one problem in other words, or two problems.

A changed number, sign, variable, unit or word such as `more` makes another problem; a typo, a synonym, another name
throughout or another order of the sentences doesn't. English words only: in other languages numbers and formulas still
count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

from sft.data.text.spelling import ENDS, MEANS, TURNING, plain_words

# Of single letters these are variables; `a` and `i` are words more often.
_VARIABLES = frozenset("bcdefghjklmnopqrstuvwxyz")

# Words that come and go with the style of a sentence, wherever they stand.
_FUNCTION_WORDS = """
    a an the this that these those there here it its he she they them his her their him you your we our us i my me
    is are was were be been being am do does did done have has had having will would can could shall should might
    must of in on at to for from by with into onto as and or but so if then than when while where which who whom
    whose what how much also just very too well now such per about total altogether together overall find s t
"""
_FUNCTION = frozenset(_FUNCTION_WORDS.split()) - TURNING


def formulas(tokens: Sequence[str]) -> list[str]:
    """The tokens (of `sft.data.text.normalize`) that two wordings of one problem share: numbers, signs, variables."""
    return [
        token
        for token in tokens
        if token in _VARIABLES or token[0].isdecimal() or (len(token) == 1 and not token.isalpha())
    ]


def same_problem(one: Sequence[str], other: Sequence[str]) -> bool:
    """Whether two nearly equal problems, as tokens `as_spelled`, ask the same."""
    other = _spelled_alike(one, other)
    ours, theirs = _sentences(_spelled_alike(other, one)), _sentences(other)
    if _same_in_order(_joined(ours), _joined(theirs)):
        return True
    moved = _in_the_order_of(ours, theirs)
    return moved != theirs and _same_in_order(_joined(ours), _joined(moved))


def _sentences(tokens: Sequence[str]) -> list[list[str]]:
    """Tokens in one spelling of each sentence."""
    result: list[list[str]] = [[]]
    for token in tokens:
        if token not in ENDS:
            result[-1].append(token)
        else:
            result.append([])
    return [plain_words(sentence) for sentence in result if sentence]


def _joined(sentences: Sequence[Sequence[str]]) -> list[str]:
    return list(chain.from_iterable(sentences))


def _in_the_order_of(model: list[list[str]], sentences: list[list[str]]) -> list[list[str]]:
    """`sentences` in the order that equal ones have in `model`; the others fill the places between in their order."""
    places: dict[tuple[str, ...], list[int]] = {}
    for place in reversed(range(len(model))):
        places.setdefault(tuple(model[place]), []).append(place)
    found = [there.pop() if (there := places.get(tuple(sentence))) else None for sentence in sentences]
    free = iter(sorted(set(range(max(len(model), len(sentences)))) - set(found)))
    order = [next(free) if place is None else place for place in found]
    return [sentence for _, sentence in sorted(zip(order, sentences, strict=True), key=lambda pair: pair[0])]


def _same_in_order(one: list[str], other: list[str]) -> bool:
    return (
        formulas(one) == formulas(other)
        and _turning(one) == _turning(other)
        and _same_roles(_content(one), _content(other))
    )


def _turning(tokens: Sequence[str]) -> list[str]:
    return [MEANS.get(token, token) for token in tokens if token in TURNING]


def _spelled_alike(one: Sequence[str], other: Sequence[str]) -> list[str]:
    """`other` with words that only it has spelled as in `one` where a slip is between them."""
    here, there = Counter(one), Counter(other)
    missing: dict[str, str] = {}
    for word in here:
        if here[word] > there[word]:
            missing.update((part, word) for part in _shortened(word))
    meant = {}
    for variant in there.keys() - here.keys():
        words = sorted({missing[part] for part in _shortened(variant) if part in missing})
        slips = (word for word in words if _is_slip(word, variant) and not {word, variant} <= TURNING)
        meant[variant] = next(slips, variant)
    parted = {
        first + second: (first, second) for first, second in pairwise(one) if first.isalpha() and second.isalpha()
    }
    return list(chain.from_iterable(parted.get(word, (word,)) for word in (meant.get(word, word) for word in other)))


def _shortened(word: str) -> Iterator[str]:
    """`word`, and what is left of it without one letter: two words share one of these if a slip may be between them."""
    yield word
    yield from (word[:place] + word[place + 1 :] for place in range(min(len(word), 24)))


def _is_slip(word: str, variant: str) -> bool:
    """Whether one letter was left out, added, swapped with its neighbour, or replaced after the first."""
    longer, shorter = sorted((word, variant), key=len, reverse=True)
    if len(longer) < 4 or len(longer) - len(shorter) > 1:
        return False
    same = next((place for place, (a, b) in enumerate(zip(word, variant, strict=False)) if a != b), len(shorter))
    if len(longer) > len(shorter):
        return longer[same + 1 :] == shorter[same:]
    swapped = word[same : same + 2] == variant[same : same + 2][::-1] and word[same + 2 :] == variant[same + 2 :]
    return swapped or (same > 0 and word[same + 1 :] == variant[same + 1 :])


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
