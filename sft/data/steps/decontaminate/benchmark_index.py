"""Finds which of a few thousand benchmark problems a text repeats, wholly or nearly or by half, by words.

Near matches are found without loss: of a problem's word pairs, k edits can destroy no more than 2k (the q-gram lemma,
Ukkonen 1992), so of any 2k + 6, say the rarest, 6 are left, and they stand as far apart as in the problem but for k
words. An index of those pairs finds the places where so many agree, and only there the texts are compared exactly
(Myers 1999, "A fast bit-vector algorithm for approximate string matching"). Work grows with the text's length.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import numpy.typing as npt

# Of a problem's rarest pairs so many must agree: more make the index larger and what it finds less.
_AGREEING = 6
# Words of an n-gram of problems too short for the usual ones, and fewest of a row that is looked for in a problem.
_SHORT_NGRAM = 6
_SHORTEST_PART = 4


@dataclass(frozen=True, slots=True)
class BenchmarkProblem:
    """One problem of a benchmark: which, and its text."""

    benchmark: str
    row: str
    text: str


@dataclass(frozen=True, slots=True)
class Match:
    """What a text repeats. `similarity` is the share of the problem's words without an edit; or, of a match by
    n-grams (`by`), the share of its n-grams that are there."""

    problem: int
    similarity: float
    by: str


@dataclass
class BenchmarkIndex:
    """The index over the words of each problem.

    Attributes:
        problems: words of each.
        similarity, ngram, overlap: as in the settings of `decontaminate`.
    """

    problems: Sequence[list[str]]
    similarity: float
    ngram: int
    overlap: float
    _pairs: dict[tuple[str, ...], npt.NDArray[np.int64]] = field(init=False, repr=False)
    _edits: npt.NDArray[np.int64] = field(init=False, repr=False)
    _needed: npt.NDArray[np.int64] = field(init=False, repr=False)
    _ngrams: dict[int, dict[tuple[str, ...], list[tuple[int, int]]]] = field(init=False, repr=False)
    _short: dict[str, list[int]] = field(init=False, repr=False)
    _parts: dict[tuple[str, ...], int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        lengths = np.array([len(words) for words in self.problems], np.int64)
        self._edits = ((1 - self.similarity) * lengths + 1e-9).astype(np.int64)
        # How many of a problem's rarest pairs any passage near to it has.
        self._needed = np.clip(lengths - 1 - 2 * self._edits, 1, _AGREEING)
        self._ngrams = {self.ngram: {}, min(_SHORT_NGRAM, self.ngram): {}}
        self._short, self._parts = defaultdict(list), {}
        frequency = Counter(pair for words in self.problems for pair in set(_runs(words, 2)))
        pairs: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, words in enumerate(self.problems):
            grams = self._ngrams[self._gram(len(words))]
            for place, gram in enumerate(_runs(words, self._gram(len(words)))):
                grams.setdefault(gram, []).append((number, place))
            for size in range(max(_SHORTEST_PART, int(np.ceil(len(words) * self.overlap))), self.ngram):
                self._parts.update((part, number) for part in _runs(words, size) if part not in self._parts)
            if len(words) < self.ngram:
                for word in set(words):
                    self._short[word].append(number)
                continue
            places = sorted(enumerate(_runs(words, 2)), key=lambda item: (frequency[item[1]], item))
            for place, pair in places[: int(self._needed[number] + 2 * self._edits[number])]:
                pairs[pair].append((number, place))
        self._pairs = {pair: np.array(found, np.int64).T for pair, found in pairs.items()}

    def _gram(self, length: int) -> int:
        return self.ngram if length >= 2 * self.ngram else min(_SHORT_NGRAM, self.ngram)

    def match(self, words: list[str]) -> Match | None:
        """The problem that `words`, a row's problem, repeats most, or None."""
        return _best([*self._short_ones(words), *self._near(words), *self._overlapping(words), *self._part(words)])

    def quoted(self, words: list[str]) -> Match | None:
        """The problem of which `words`, a text of any length, repeats most n-grams, or None."""
        return _best(self._overlapping(words))

    def _short_ones(self, words: list[str]) -> Iterator[Match]:
        """Problems of a few words, which may stand anywhere, are whole problems only; one number may be another."""
        if len(words) > self.ngram / self.similarity:
            return
        shared = Counter(chain.from_iterable(self._short.get(word, ()) for word in set(words)))
        for number in sorted(shared):
            problem = self.problems[number]
            edits = fewest_edits(problem, words, passage=False)
            if edits <= self._edits[number] or (edits == 1 and _one_number_differs(problem, words)):
                yield Match(number, 1 - edits / len(problem), "words")

    def _near(self, words: list[str]) -> Iterator[Match]:
        """Problems that stand in `words` but for their edits."""
        there = list(map(self._pairs.get, _runs(words, 2)))
        found = [postings for postings in there if postings is not None]
        if not found:
            return
        numbers, offsets = np.concatenate(found, axis=1)
        often = (np.bincount(numbers, minlength=len(self.problems)) >= self._needed)[numbers]
        if not often.any():
            return
        places = [place for place, postings in enumerate(there) if postings is not None]
        starts = np.repeat(places, [postings.shape[1] for postings in found]) - offsets
        best: dict[int, int] = {}
        for number, start, end in self._windows(numbers[often], starts[often]):
            edits = fewest_edits(self.problems[number], words[max(start, 0) : end], passage=True)
            best[number] = min(edits, best.get(number, edits))
        for number, edits in best.items():
            if edits <= self._edits[number]:
                yield Match(number, 1 - edits / len(self.problems[number]), "words")

    def _windows(self, numbers: npt.NDArray[np.int64], starts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, int]]:
        """(problem, start, end) of the stretches of text in which it may stand.

        `numbers`, `starts` (n,): of each pair that is found, its problem and where that would begin. In a passage with
        k edits these differ by no more than k: they lie in one of the spans [b, b + 2) * (k + 1).
        """
        lowest = int(starts.min())
        widths = self._edits[numbers] + 1
        spans = (starts - lowest) // widths
        stride = int(spans.max()) + 2
        keys, counts = np.unique(
            np.concatenate([numbers * stride + spans, numbers * stride + spans + 1]), return_counts=True
        )
        keys = keys[counts >= self._needed[keys // stride]]
        current: tuple[int, int, int] | None = None
        for number, span in zip((keys // stride).tolist(), (keys % stride).tolist(), strict=True):
            edits = int(self._edits[number])
            start = lowest + (span - 1) * (edits + 1) - edits
            end = start + 2 * (edits + 1) + 3 * edits + len(self.problems[number])
            if current and current[0] == number and start <= current[2]:
                current = (number, current[1], end)
                continue
            if current:
                yield current
            current = (number, start, end)
        if current:
            yield current

    def _overlapping(self, words: list[str]) -> Iterator[Match]:
        """Problems of which enough words stand in `words` in common n-grams."""
        found: dict[int, set[int]] = defaultdict(set)
        for size, grams in self._ngrams.items():
            if grams.keys().isdisjoint(_runs(words, size)):  # as with nearly all texts
                continue
            for gram in set(_runs(words, size)):
                for number, place in grams.get(gram, ()):
                    found[number].update(range(place, place + size))
        for number, covered in found.items():
            length = len(self.problems[number])
            if len(covered) >= self.overlap * length:
                yield Match(number, len(covered) / length, f"{self._gram(length)}-grams")

    def _part(self, words: list[str]) -> Iterator[Match]:
        """A problem of which `words`, fewer than an n-gram, are a part."""
        number = self._parts.get(tuple(words))
        if number is not None:
            yield Match(number, len(words) / len(self.problems[number]), "part")


def _best(found: Iterable[Match]) -> Match | None:
    return max(found, key=lambda match: (match.similarity, -match.problem), default=None)


def _runs(words: list[str], size: int) -> Iterator[tuple[str, ...]]:
    return zip(*(words[start:] for start in range(size)), strict=False)


def _one_number_differs(one: list[str], other: list[str]) -> bool:
    differing = [pair for pair in zip(one, other, strict=False) if pair[0] != pair[1]]
    return len(one) == len(other) > 2 and len(differing) == 1 and all(word[0].isdigit() for word in differing[0])


def fewest_edits(pattern: Sequence[str], text: Sequence[str], *, passage: bool) -> int:
    """Fewest insertions, deletions and replacements of words that turn `pattern` into `text`, or with `passage` into
    some passage of it. (Myers 1999; a column of the edit matrix is two integers of len(pattern) bits.)"""
    length = len(pattern)
    ones = (1 << length) - 1
    positions: dict[str, int] = {}
    for place, word in enumerate(pattern):
        positions[word] = positions.get(word, 0) | 1 << place
    last = 1 << (length - 1)
    up, down, score = ones, 0, length  # vertical differences +1 and -1 of the current column, its last value
    best = score
    for word in text:
        equal = positions.get(word, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right, left = down | (~(diagonal | up) & ones), up & diagonal
        score += bool(right & last) - bool(left & last)
        # The row above the first: zeros where a passage may begin anywhere, 1, 2, 3 ... where it may not.
        right, left = (right << 1 | (not passage)) & ones, (left << 1) & ones
        up, down = left | (~(diagonal | right) & ones), right & diagonal
        best = min(best, score)
    return best if passage else score
