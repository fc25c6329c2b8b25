"""Majority@k against votes that are counted one by one."""

from __future__ import annotations

import random
from collections import Counter
from itertools import combinations

import pytest

from sft.evaluate.majority import majority_at_k

Samples = list[tuple[str | None, bool]]


def counted(samples: Samples, k: int) -> float:
    """The mean over all choices of k samples of the chance that the vote is right."""
    total = []
    for chosen in combinations(samples, k):
        votes = Counter("right" if right else f"wrong {answer}" for answer, right in chosen if answer or right)
        most = max(votes.values(), default=0)
        winners = [answer for answer, number in votes.items() if number == most]
        total.append(winners.count("right") / len(winners) if winners else 0.0)
    return sum(total) / len(total)


@pytest.mark.parametrize("seed", range(12))
def test_equals_votes_counted_one_by_one(seed: int) -> None:
    rng = random.Random(seed)
    answers = [("7", True), ("8", False), ("9", False), ("10", False), (None, False)]
    weights = [rng.random() ** 2 for _ in answers]
    problems: list[Samples] = [rng.choices(answers, weights, k=rng.randint(5, 10)) for _ in range(3)]
    for k in range(1, 6):
        assert majority_at_k(problems, k) == pytest.approx(sum(counted(p, k) for p in problems) / 3, abs=1e-12)


def test_one_vote_is_pass_at_1_and_all_votes_are_one_vote() -> None:
    samples: Samples = [("7", True)] * 3 + [("8", False)] * 2 + [(None, False)] * 4
    assert majority_at_k([samples], 1) == pytest.approx(3 / 9)
    assert majority_at_k([samples], 9) == 1.0  # most of the votes, though not of the samples


def test_a_tie_is_split_and_silence_is_wrong() -> None:
    assert majority_at_k([[("7", True), ("8", False)]], 2) == 0.5
    assert majority_at_k([[("7", True), ("8", False), ("9", False)]], 3) == pytest.approx(1 / 3)
    assert majority_at_k([[(None, False)] * 2], 2) == 0.0


def test_answers_are_grouped_by_the_judge_and_as_it_reads_them() -> None:
    # Right ones are one answer however they are written; so are wrong ones that are one number, or differ in dress.
    right: Samples = [("0.5", True), (r"\frac12", True)]
    assert majority_at_k([[*right, ("3", False), ("2", False), ("1", False)]], 5) == 1.0
    for written in (
        ("0.25", "1/4", r"\frac{1}{4}"),
        (r"\dfrac{x}{3}", r"$\frac{x}{3}$", r"\frac{x}{3}."),
        (r"\{1, 2\}", r"\{2,1\}", "2, 1"),
        (r"\text{east}", "East", "east"),
        ("5x", "5 x", "$5x$"),
    ):
        assert majority_at_k([[*right, *((answer, False) for answer in written)]], 5) == 0.0


def test_many_samples_equal_draws() -> None:
    """64 samples, as of AIME, whose choices can't be counted one by one."""
    rng = random.Random(0)
    chances = [rng.random() for _ in range(10)]
    problems: list[Samples] = [
        [("1", True) if rng.random() < chance else (str(rng.randint(2, 5)), False) for _ in range(64)]
        for chance in chances
    ]
    for k in (4, 32):
        drawn = [counted(rng.sample(samples, k), k) for samples in problems for _ in range(2000)]
        error = (sum(value * (1 - value) for value in drawn) / len(drawn) / len(drawn)) ** 0.5
        assert majority_at_k(problems, k) == pytest.approx(sum(drawn) / len(drawn), abs=4 * error + 1e-3)


def test_too_few_samples_are_told() -> None:
    for problems, k in (([], 1), ([[("1", True)]], 2), ([[("1", True)]], 0)):
        with pytest.raises(ValueError, match=f"majority@{k} needs at least {k}"):
            majority_at_k(problems, k)
