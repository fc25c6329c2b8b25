"""Intervals and pass@k against published and brute-force values."""

from __future__ import annotations

from itertools import combinations

import pytest

from sft.evaluate.intervals import pass_at_1, pass_at_k, percentile, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [
        # Newcombe 1998, table I, method 3 (Wilson without continuity correction).
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_matches_published_values(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_one_sample_a_problem_is_plain_wilson() -> None:
    estimate = pass_at_1([[True]] * 81 + [[False]] * 182)
    assert (estimate.low, estimate.high) == wilson(81, 263)
    assert estimate.value == pytest.approx(81 / 263)


def test_samples_of_a_problem_that_agree_count_as_one() -> None:
    once = pass_at_1([[True]] * 30 + [[False]] * 20)
    repeated = pass_at_1([[True] * 8] * 30 + [[False] * 8] * 20)
    assert (repeated.low, repeated.high) == (pytest.approx(once.low), pytest.approx(once.high))


def test_samples_that_vary_within_problems_narrow_the_interval() -> None:
    varied = pass_at_1([[True, True, False, False]] * 20)
    once = pass_at_1([[True]] * 10 + [[False]] * 10)
    assert varied.value == once.value
    assert varied.high - varied.low < 0.6 * (once.high - once.low)


def test_ends_are_never_certain() -> None:
    assert pass_at_1([[True] * 4] * 10).low < 0.75
    assert pass_at_1([[True] * 4] * 10).high == 1.0
    assert pass_at_1([]).low == 0.0 and pass_at_1([]).high == 1.0


def test_pass_at_k_equals_all_draws() -> None:
    samples = [True, False, False, True, False]
    for k in range(1, 6):
        draws = list(combinations(samples, k))
        assert pass_at_k([samples], k) == pytest.approx(sum(any(draw) for draw in draws) / len(draws))
    with pytest.raises(ValueError, match="needs at least 6"):
        pass_at_k([samples], 6)


def test_percentiles() -> None:
    assert percentile([1, 2, 3, 4], 0.5) == 2.5
    assert percentile([5], 0.99) == 5
    assert percentile([3, 1, 2], 1.0) == 3
