"""How much a text repeats itself: loops at its end, and passages that stood there before. Linear in the text's length
(but for a sort of its words)."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from itertools import count
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

SHORTEST_LOOP = 64
"""Characters from which a repeated end is a loop: the zeros of a million and the rule of a table are none."""

# Characters of scripts that write no spaces are words of their own; anything else is cut into words of at most 16
# characters, so that a text without spaces has words too.
_WIDE = "\u2e80-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_WIDE}]|[^\s{_WIDE}]{{1,16}}")

_MODULUS = (1 << 31) - 1
_BASE = 1_103_515_245
_BLOCK = 1024


class Loop(NamedTuple):
    """The end of a text is `copies` whole copies of `passage` (from wherever the last one was cut off)."""

    passage: str
    copies: int


def looping_end(text: str, copies: int) -> Loop | None:
    """The shortest passage that the text's end repeats at least `copies` times, over at least SHORTEST_LOOP characters.

    Whitespace at the very end doesn't count.
    """
    text = text.rstrip()
    longest = len(text) // copies
    # An end of at least 64 characters and two copies has its last 32 once more, at most one passage before: most
    # texts are done here.
    probe = text[-SHORTEST_LOOP // 2 :]
    if len(text) < SHORTEST_LOOP or text.rfind(probe, max(0, len(text) - len(probe) - longest), -1) < 0:
        return None
    for period in _likely_periods(text, copies):
        length = max(copies * period, SHORTEST_LOOP)
        if text[-length:-period] == text[-length + period :]:
            return _counted(text, period)
    return None


def _likely_periods(text: str, copies: int) -> list[int]:
    """Periods of the text's end, ascending: a polynomial hash of all ends at once (Karp & Rabin 1987), which may be
    wrong once in 2^31 times."""
    letters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    size = len(letters)
    powers = _powers(size)
    prefix = np.zeros(size + 1, np.int64)
    np.cumsum(letters * powers[:-1] % _MODULUS, out=prefix[1:])
    prefix %= _MODULUS
    period = np.arange(1, size // copies + 1)
    start = size - np.maximum(copies * period, SHORTEST_LOOP)
    period, start = period[start >= 0], start[start >= 0]
    earlier = (prefix[size - period] - prefix[start]) % _MODULUS * powers[period] % _MODULUS
    later = (prefix[size] - prefix[start + period]) % _MODULUS
    return [int(found) for found in period[earlier == later]]


def _powers(size: int) -> NDArray[np.int64]:
    """_BASE to the powers 0 ... size, modulo _MODULUS."""
    low = np.array([pow(_BASE, i, _MODULUS) for i in range(_BLOCK)], np.int64)
    high = np.array([pow(_BASE, i * _BLOCK, _MODULUS) for i in range(size // _BLOCK + 1)], np.int64)
    return (high[:, None] * low % _MODULUS).reshape(-1)[: size + 1]


def _counted(text: str, period: int) -> Loop:
    passage = text[-period:]
    copies, end = 0, len(text)
    while text.startswith(passage, end - period) and end >= period:
        copies, end = copies + 1, end - period
    return Loop(passage, copies)


def repeated_share(texts: Sequence[str], ngram: int) -> float:
    """Share of the words that lie in `ngram` words in a row which stood in the same text before (0 ... 1).

    The first occurrence doesn't count, so a text written twice has a share of one half. As the duplicate n-grams of
    Gopher's filters (Rae et al. 2021, arXiv 2112.11446), in words and with one long n-gram: reasoning repeats formulas,
    but not twenty words in a row.
    """
    words = [_WORD.findall(text) for text in texts]
    total = sum(map(len, words))
    return sum(_repeated(of_text, ngram) for of_text in words) / total if total else 0.0


def _repeated(words: list[str], ngram: int) -> int:
    windows = len(words) - ngram + 1
    if windows < 2:
        return 0
    numbers: defaultdict[str, int] = defaultdict(count(1).__next__)
    ids = np.fromiter(map(numbers.__getitem__, words), np.uint64, len(words))
    hashes = np.zeros(windows, np.uint64)
    for offset, factor in enumerate(_factors(ngram)):
        hashes += ids[offset : offset + windows] * factor
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    later = order[1:][ordered[1:] == ordered[:-1]]
    edges = np.zeros(len(words) + 1, np.int64)
    edges[later] += 1
    edges[later + ngram] -= 1
    return int(np.count_nonzero(np.cumsum(edges) > 0))


@cache
def _factors(count: int) -> NDArray[np.uint64]:
    """Fixed random odd numbers, for a multilinear hash modulo 2^64."""
    drawn = np.random.Generator(np.random.PCG64(20)).integers(0, 1 << 63, count, dtype=np.uint64)
    return drawn * np.uint64(2) + np.uint64(1)
