"""Majority@k: how often the answer that most of k samples give is right (self-consistency, Wang et al. 2023)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence
from functools import lru_cache
from math import comb

from sft.answers.compare import compare
from sft.answers.normal import normal
from sft.answers.numbers import parse_number

_MOST_COMPARED = 32
"""Of so many wrong answers to a problem each is compared with each; of more, only those that are one number, or are
written alike, count as one."""


def majority_at_k(samples_by_problem: Sequence[Sequence[tuple[str | None, bool]]], k: int) -> float:
    """The chance that a vote of k of a problem's samples is right, averaged over problems; exact, without drawing.

    `samples_by_problem` holds (answer, whether the judge found it right) of each problem's samples. What the judge
    found right is one answer, however it is written; other answers are the same where the judge finds them equal
    without computer algebra, which would take seconds: as numbers, texts, words, lists, sets and intervals. A sample
    without an answer has no vote. Of answers with equally many votes each wins equally often; where nobody votes,
    nothing is right. Of n > k samples the mean over all C(n, k) choices is taken.

    Raises ValueError when a problem has fewer than k samples, and where there is none.
    """
    if not samples_by_problem or k < 1 or any(len(samples) < k for samples in samples_by_problem):
        raise ValueError(f"majority@{k} needs at least {k} samples of every problem")
    return sum(_won(*_votes(samples), k) for samples in samples_by_problem) / len(samples_by_problem)


def _votes(samples: Sequence[tuple[str | None, bool]]) -> tuple[int, int, tuple[int, ...]]:
    """How many samples are right, how many have no answer, and how many give each of the wrong answers."""
    right = sum(is_right for _, is_right in samples)
    wrong = tuple(answer for answer, is_right in samples if not is_right and answer is not None)
    return right, len(samples) - right - len(wrong), _alike(wrong)


@lru_cache(maxsize=65536)
def _alike(answers: tuple[str, ...]) -> tuple[int, ...]:
    """How often each of the answers is given, in ascending order."""
    written = Counter(map(_key, answers))
    first = {_key(answer): answer for answer in reversed(answers)}
    counts: dict[str, int] = {}
    for key, count in written.items():
        others = counts if len(written) <= _MOST_COMPARED else ()
        same = next((other for other in others if _same(other, first[key])), first[key])
        counts[same] = counts.get(same, 0) + count
    return tuple(sorted(counts.values()))


def _key(answer: str) -> Hashable:
    """What is equal for answers that are one number, or are written alike."""
    number = parse_number(answer)
    return (number.scaled.value, number.unit) if number else "".join(normal(answer).split())


def _same(one: str, other: str) -> bool:
    """Whether the judge takes two answers for one, of those whose keys differ."""
    if parse_number(one) is not None and parse_number(other) is not None:
        return False
    return compare(one, other, lambda mine, gold: ("undecided", ""))[0] == "right"


@lru_cache(maxsize=4096)
def _won(right: int, silent: int, wrong: tuple[int, ...], k: int) -> float:
    """The share of the choices of k samples whose vote is right; a tie of t + 1 answers counts as 1 / (t + 1)."""
    won = 0.0
    total = comb(right + silent + sum(wrong), k)
    for votes in range(1, min(right, k) + 1):
        for (chosen, ties), ways in _beaten(silent, wrong, votes, k - votes).items():
            if chosen == k - votes:
                won += comb(right, votes) * ways / (total * (ties + 1))
    return won


def _beaten(silent: int, wrong: tuple[int, ...], votes: int, room: int) -> dict[tuple[int, int], int]:
    """In how many ways at most `room` samples that aren't right are chosen, by (how many, wrong answers with as many
    votes as the right one has), none of which has more."""
    # An answer that can't reach so many votes is chosen from as freely as silence.
    free = silent + sum(count for count in wrong if count < votes)
    ways = {(chosen, 0): comb(free, chosen) for chosen in range(min(free, room) + 1)}
    for count in wrong:
        if count < votes:
            continue
        longer: defaultdict[tuple[int, int], int] = defaultdict(int)
        for (chosen, ties), number in ways.items():
            for more in range(min(votes, room - chosen) + 1):
                longer[chosen + more, ties + (more == votes)] += number * comb(count, more)
        ways = longer
    return ways
