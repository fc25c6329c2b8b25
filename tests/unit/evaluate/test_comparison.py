"""Differences of two models: against published values, exact tests, and thousands of simulated pairs."""

from __future__ import annotations

from itertools import product
from math import sqrt

import numpy as np
import pytest

from sft.evaluate.comparison import (
    Shares,
    detectable,
    holm,
    mean_difference,
    recovered,
    share_difference,
    t_outside,
    t_quantile,
)
from sft.evaluate.intervals import Z95

PAIRS = 2000


def same_samples(a: np.ndarray, b: np.ndarray, samples: int) -> Shares:
    count = [samples] * len(a)
    return Shares.of(a.tolist(), b.tolist(), count, count)


# ---- published values ----


def test_students_t_is_that_of_the_tables() -> None:
    published = {
        1: 12.7062,
        2: 4.3027,
        3: 3.1824,
        4: 2.7764,
        5: 2.5706,
        10: 2.2281,
        29: 2.0452,
        30: 2.0423,
        120: 1.9799,
    }
    for freedom, value in published.items():
        assert t_quantile(freedom) == pytest.approx(value, abs=6e-5)
    assert t_quantile(1, 0.5) == pytest.approx(1.0) and t_quantile(10**6) == pytest.approx(Z95, abs=1e-5)
    assert t_outside(0.0, 7) == 1.0 and 0 <= t_outside(1e6, 500) < 1e-12


@pytest.mark.parametrize(
    ("a", "b", "problems", "low", "high"),
    [
        # Newcombe 1998 (873-890), table II, method 10.
        (3, 9, 10, 0.1705, 0.8090),
        (0, 10, 10, 0.6075, 1.0),
        (2, 6, 7, 0.0582, 0.8062),
        # Fagerland, Lydersen and Laake 2014, a paired table whose corrected correlation is zero.
        (2, 8, 21, 0.0256, 0.5069),
    ],
)
def test_recovery_matches_published_values(a: int, b: int, problems: int, low: float, high: float) -> None:
    found = recovered((a / problems, problems), (b / problems, problems), 0.0, Z95)
    assert found == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_many_problems_have_the_plain_interval_of_paired_shares() -> None:
    # 2 x 2 table: both right, B alone, A alone, neither.
    both, alone_b, alone_a, neither = 5000, 1200, 800, 3000
    a = np.repeat([1.0, 0.0, 1.0, 0.0], [both, alone_b, alone_a, neither])
    b = np.repeat([1.0, 1.0, 0.0, 0.0], [both, alone_b, alone_a, neither])
    problems = len(a)
    value = (alone_b - alone_a) / problems
    half = Z95 * sqrt((alone_b + alone_a) / problems - value**2) / sqrt(problems)
    found = share_difference(same_samples(a, b, 1))
    assert found.interval == (pytest.approx(value - half, rel=2e-3), pytest.approx(value + half, rel=2e-3))


# ---- simulated pairs ----


def simulate(rng: np.random.Generator, problems: int, samples: int, gain: float) -> tuple[Shares, float]:
    """Problems as hard as they come: uniform chances of A; B's are `gain` of the way from there to certainty."""
    chances = rng.random(problems)
    better = chances + gain * (1 - chances)
    a, b = (rng.binomial(samples, chance) / samples for chance in (chances, better))
    return same_samples(a, b, samples), gain / 2


@pytest.mark.parametrize(
    ("problems", "samples", "gain"), [(200, 3, 0.0), (200, 3, 0.1), (100, 8, 0.05), (500, 1, 0.1), (30, 16, 0.2)]
)
def test_simulated_pairs_are_covered(problems: int, samples: int, gain: float) -> None:
    rng = np.random.default_rng(problems + samples)
    covered, significant = 0, 0
    for _ in range(PAIRS):
        shares, true = simulate(rng, problems, samples, gain)
        found = share_difference(shares)
        assert found.interval is not None and found.p is not None
        covered += found.interval[0] <= true <= found.interval[1]
        # An interval that leaves zero out is p below 5%, and no other is.
        assert (found.p < 0.05) == (not found.interval[0] <= 0 <= found.interval[1])
        significant += found.p < 0.05
    assert 0.94 <= covered / PAIRS <= 0.96
    if not gain:
        assert significant == PAIRS - covered


@pytest.mark.parametrize(("problems", "samples", "rate"), [(10, 1, 0.05), (10, 1, 0.3), (15, 4, 0.1), (30, 1, 0.02)])
def test_few_problems_and_rare_changes_are_covered(problems: int, samples: int, rate: float) -> None:
    """B solves what A does, and `rate` of the rest: t over the problems' differences is empty in up to half of them."""
    rng = np.random.default_rng(problems)
    covered = 0
    for _ in range(PAIRS):
        solved = rng.random(problems) < 0.5
        gained = rng.binomial(samples, rate, problems) / samples
        found = share_difference(same_samples(solved.astype(float), np.where(solved, 1.0, gained), samples))
        assert found.interval is not None
        covered += found.interval[0] <= rate / 2 <= found.interval[1]
    assert covered / PAIRS >= 0.94


def test_agreement_on_every_problem_leaves_room() -> None:
    """Both solve the same 15 of 30: with a rule of three, up to a tenth of problems may change sides for all that."""
    solved = np.repeat([0.0, 1.0], 15)
    for samples in (1, 16):
        found = share_difference(same_samples(solved, solved, samples))
        assert found.interval is not None and found.interval[0] < -0.05 and found.interval[1] > 0.05 and found.p == 1.0


def test_pairing_narrows_the_interval() -> None:
    """Uniform chances and three samples: the shares' correlation is 0.6, and sqrt(1 - 0.6) = 0.632."""
    rng = np.random.default_rng(1)
    ratios, correlations = [], []
    for _ in range(PAIRS):
        shares, _ = simulate(rng, 300, 3, 0.0)
        paired, unpaired = share_difference(shares).interval, share_difference(shares, paired=False).interval
        assert paired is not None and unpaired is not None
        ratios.append((paired[1] - paired[0]) / (unpaired[1] - unpaired[0]))
        correlations.append(shares.correlation)
    assert np.mean(correlations) == pytest.approx(0.6, abs=0.01)
    assert np.mean(ratios) <= 0.65


def test_p_is_near_the_exact_tests() -> None:
    """All sign flips of the problems' differences, 4,096 of them."""
    rng = np.random.default_rng(2)
    signs = np.array(list(product((-1, 1), repeat=12)))
    for _ in range(20):
        chances = rng.random(12)
        a, b = (rng.binomial(16, np.clip(chances + gain, 0, 1)) / 16 for gain in (0.0, 0.1 * rng.random()))
        flipped = signs @ (b - a)
        exact = np.mean(np.abs(flipped) >= abs((b - a).sum()) - 1e-9)
        found = share_difference(same_samples(a, b, 16))
        # From a wider interval, never from a narrower one.
        assert found.p is not None and found.p >= 0.7 * exact - 0.01


# ---- edges ----


def test_nothing_is_certain_and_one_problem_says_nothing() -> None:
    ones, none = np.ones(40), np.zeros(40)
    same = share_difference(same_samples(ones, ones, 8))
    assert same.value == 0 and same.p == 1.0 and same.interval is not None and same.interval[0] < 0 < same.interval[1]
    apart = share_difference(same_samples(none, ones, 8))
    assert apart.interval is not None and 0.8 < apart.interval[0] < apart.interval[1] == 1.0
    alone = share_difference(same_samples(none[:1], ones[:1], 8))
    assert (alone.value, alone.interval, alone.p) == (1.0, None, None)
    two = share_difference(same_samples(np.array([0.2, 0.4]), np.array([0.3, 0.5]), 10))
    assert two.interval is not None and two.interval[0] < -0.5 and two.p is not None and two.p > 0.05


def test_the_order_of_models_and_problems_is_nothing() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.binomial(4, 0.4, 50) / 4, rng.binomial(4, 0.6, 50) / 4
    one, other = share_difference(same_samples(a, b, 4)), share_difference(same_samples(b, a, 4))
    assert one.interval is not None and other.interval is not None
    assert one.interval == pytest.approx((-other.interval[1], -other.interval[0])) and one.p == pytest.approx(other.p)
    order = rng.permutation(50)
    assert share_difference(same_samples(a[order], b[order], 4)).interval == pytest.approx(one.interval)


def test_what_is_no_share_is_refused() -> None:
    for a, b, count in (([], [], []), ([0.5], [0.5, 1.0], [1]), ([1.5], [0.5], [1]), ([0.5], [0.5], [0])):
        with pytest.raises(ValueError, match="share"):
            Shares.of(a, b, count, count)


def test_means_are_compared_by_students_paired_t() -> None:
    # Student 1908, table of Cushny and Peebles: hours of sleep gained by two drugs; t = 4.0621, p = 0.002833.
    a = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    b = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = mean_difference(a, b)
    assert found.value == pytest.approx(1.58) and found.p == pytest.approx(0.002833, abs=1e-6)
    assert found.interval == (pytest.approx(0.7001, abs=1e-4), pytest.approx(2.4599, abs=1e-4))
    assert mean_difference([1.0, 2.0], [1.0, 2.0]).p == 1.0 and mean_difference([1.0], [2.0]).p is None


def test_holm_corrects_the_smallest_most() -> None:
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


# ---- what it takes ----


def test_so_many_problems_and_samples_do_show_the_difference() -> None:
    """What is asked for is simulated: about 80% of such comparisons see it."""
    rng = np.random.default_rng(4)
    pilot, size = simulate(rng, 4000, 4, 0.1)
    power = detectable(pilot, size)
    assert power.problems is not None and power.samples is not None
    smaller = detectable(Shares(pilot.a[:150], pilot.b[:150], pilot.samples_a[:150], pilot.samples_b[:150]), size)
    assert smaller.samples is not None and smaller.samples > 1
    for problems, samples in ((power.problems, 4), (150, smaller.samples)):
        seen = 0
        for _ in range(500):
            found = share_difference(simulate(rng, problems, samples, 0.1)[0])
            seen += found.p is not None and found.p < 0.05
        assert 0.7 < seen / 500 < 0.92


def test_the_smallest_difference_that_is_seen_takes_what_there_is() -> None:
    shares, _ = simulate(np.random.default_rng(5), 80, 6, 0.1)
    smallest = detectable(shares).smallest
    assert smallest is not None
    again = detectable(shares, smallest)
    assert again.problems in (80, 81) and again.samples in (6, 7)
    assert detectable(shares, smallest / 50).problems == pytest.approx(80 * 2500, rel=0.02)
    # Where problems differ by themselves, no number of samples helps.
    rng = np.random.default_rng(7)
    apart = same_samples(rng.random(80).round(), rng.random(80).round(), 6)
    assert detectable(apart, 0.01).samples is None and detectable(apart, 0.01).known


def test_one_sample_cant_tell_samples_from_problems() -> None:
    shares, _ = simulate(np.random.default_rng(6), 80, 1, 0.1)
    assert not detectable(shares, 0.05).known and detectable(shares, 0.05).samples is None
    alike = same_samples(np.ones(9), np.ones(9), 1)
    assert detectable(alike, 0.05).smallest is None and detectable(alike, 0.05).problems is None
