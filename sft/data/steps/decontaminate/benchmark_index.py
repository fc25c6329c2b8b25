"""Finds which of a few thousand benchmark problems a text repeats, wholly or nearly, by words.

Near matches are found without loss: an index of word pairs counts, for every benchmark problem, how many of its pairs
the text has; k edits can destroy no more than 2k of them (the q-gram lemma, Ukkonen 1992), so that all others are out,
and the few left over are compared exactly (Myers 1999, "A fast bit-vector algorithm for approximate string matching").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


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
    _needed: npt.NDArray[np.int64] = field(init=False, repr=False)
    _ngrams: dict[tuple[str, ...], list[int]] = field(init=False, repr=False)
    _ngram_counts: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        pairs: dict[tuple[str, ...], list[int]] = {}
        ngrams: dict[tuple[str, ...], list[int]] = {}
        self._ngram_counts = []
        for number, words in enumerate(self.problems):
            for pair in _pairs(words):
                pairs.setdefault(pair, []).append(number)
            distinct = _ngrams(words, self.ngram)
            self._ngram_counts.append(len(distinct))
            for gram in distinct:
                ngrams.setdefault(gram, []).append(number)
        self._pairs = {pair: np.array(numbers, np.int64) for pair, numbers in pairs.items()}
        self._ngrams = ngrams
        self._needed = np.array([self._needed_pairs(len(words)) for words in self.problems], np.int64)

    def _edits(self, length: int) -> int:
        """How many edits a problem of so many words may have."""
        return int((1 - self.similarity) * length + 1e-9)

    def _needed_pairs(self, length: int) -> int:
        """How many of its pairs a text with at most k edits has: all but 2k, and in a passage those of the ends."""
        ends = 0 if self._as_passage(length) else 2
        return max(length - 1 + ends - 2 * self._edits(length), 1)

    def _as_passage(self, length: int) -> bool:
        """Whether a problem of so many words is looked for in passages of texts; a few words may stand anywhere."""
        return length >= self.ngram

    def match(self, words: list[str]) -> Match | None:
        """The problem that `words`, a row's problem, repeats most, or None."""
        found = [*self._near(words), *self._overlapping(words)]
        return max(found, key=lambda match: (match.similarity, -match.problem), default=None)

    def quoted(self, words: list[str]) -> Match | None:
        """The problem of which `words`, a text of any length, repeats most n-grams, or None."""
        return max(self._overlapping(words), key=lambda match: (match.similarity, -match.problem), default=None)

    def _near(self, words: list[str]) -> list[Match]:
        postings = [self._pairs[pair] for pair in set(_pairs(words)) if pair in self._pairs]
        if not postings:
            return []
        shared = np.bincount(np.concatenate(postings), minlength=len(self.problems))
        matches = []
        for number in np.flatnonzero(shared >= self._needed).tolist():
            problem = self.problems[number]
            edits = fewest_edits(problem, words, passage=self._as_passage(len(problem)))
            if edits <= self._edits(len(problem)):
                matches.append(Match(number, 1 - edits / len(problem), "words"))
        return matches

    def _overlapping(self, words: list[str]) -> list[Match]:
        counts: dict[int, int] = {}
        for gram in _ngrams(words, self.ngram):
            for number in self._ngrams.get(gram, ()):
                counts[number] = counts.get(number, 0) + 1
        shares = ((number, count / self._ngram_counts[number]) for number, count in counts.items())
        return [Match(number, share, f"{self.ngram}-grams") for number, share in shares if share >= self.overlap]


def _pairs(words: list[str]) -> list[tuple[str, ...]]:
    # The ends count as words, so that a single word has pairs too.
    return list(zip(["", *words], [*words, ""], strict=True))


def _ngrams(words: list[str], size: int) -> set[tuple[str, ...]]:
    return set(zip(*(words[start:] for start in range(size)), strict=False))


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
