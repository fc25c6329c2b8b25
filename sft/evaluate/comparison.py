"""Differences between two models on the same problems: intervals, p values, and what it takes to see a difference.

The unit is the problem: a problem's samples go together (they are a cluster), and so do two models' samples of it (a
pair). The interval of a difference d of shares is, at each end, the wider of two, with q the quantile of Student's t at
problems - 1 degrees of freedom:

1. d -+ q s / sqrt(problems), s the standard deviation of the problems' differences (Miller 2024, arXiv 2411.00640). It
   is right for shares of many samples, and empty where hardly any problem differs.
2. The method of variance estimates recovery (Newcombe 1998, method 10; Zou and Donner 2008), which isn't: with the
   shares' Wilson intervals l1..u1 and l2..u2 at q and the effective numbers of trials, and r the correlation over
   problems with Newcombe's correction, from d - sqrt((p2 - l2)^2 - 2 r (p2 - l2) (u1 - p1) + (u1 - p1)^2), and the
   mirror image above.

With hundreds of problems both are alike. The p value belongs to the interval: 1 minus the level at which it just
reaches zero, so that it is below 5% where the 95% interval leaves zero out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import atan2, ceil, cos, isfinite, pi, sin, sqrt
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.evaluate.intervals import effective_trials, wilson

LEVEL = 0.95
POWER = 0.8
_Z_SUM = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
# So many problems aren't enough to tell a correlation.
_FEW = 5
_LARGEST_T = 1e6
Values = NDArray[np.float64]


@dataclass(frozen=True)
class Difference:
    """`b` minus `a`, both means over the same problems. One problem alone says nothing of others: no interval, no p."""

    a: float
    b: float
    interval: tuple[float, float] | None
    p: float | None

    @property
    def value(self) -> float:
        """How much more `b` is."""
        return self.b - self.a

    def as_json(self) -> dict[str, Any]:
        """As `sft compare --json` has it."""
        interval = None if self.interval is None else list(self.interval)
        return {"a": self.a, "b": self.b, "difference": self.value, "interval": interval, "p": self.p}


@dataclass(frozen=True)
class Shares:
    """The problems' shares (0 to 1) of two models, in the same order, and from how many samples of each problem."""

    a: Values
    b: Values
    samples_a: NDArray[np.int64]
    samples_b: NDArray[np.int64]

    @classmethod
    def of(cls, a: Sequence[float], b: Sequence[float], samples_a: Sequence[int], samples_b: Sequence[int]) -> Shares:
        """From lists. Raises ValueError for none, for lists that differ in length, and for what is no share."""
        if not len(a) == len(b) == len(samples_a) == len(samples_b) or not len(a):
            raise ValueError("shares of two models need the same problems, at least one")
        shares = cls(np.asarray(a, float), np.asarray(b, float), np.asarray(samples_a), np.asarray(samples_b))
        inside = all(np.all((side >= 0) & (side <= 1)) for side in (shares.a, shares.b))
        if not inside or min(shares.samples_a.min(), shares.samples_b.min()) < 1:
            raise ValueError("shares are from 0 to 1, of at least one sample")
        return shares

    @property
    def correlation(self) -> float:
        """Of the two models' shares over the problems; 0 where one is the same everywhere, or problems are few."""
        a, b = self.a - self.a.mean(), self.b - self.b.mean()
        scale = sqrt(float(a @ a) * float(b @ b))
        return float(a @ b) / scale if len(a) >= _FEW and scale > 1e-12 else 0.0


# ---- differences ----


def share_difference(shares: Shares, *, paired: bool = True) -> Difference:
    """The difference of the mean shares, its 95% interval and p.

    `paired` False: the interval that two models would have on problems of their own, for comparison.
    """
    freedom = len(shares.a) - 1
    if not freedom:
        return Difference(float(shares.a[0]), float(shares.b[0]), None, None)
    limits = _Limits(shares, paired)
    return Difference(limits.a, limits.b, limits.at(t_quantile(freedom)), limits.p_value(freedom))


def recovered(
    a: tuple[float, float], b: tuple[float, float], correlation: float, quantile: float
) -> tuple[float, float]:
    """The interval of a difference of shares, `b` minus `a`, by the method of variance estimates recovery; each is its
    share and the number of trials that it is worth."""
    (low_a, high_a), (low_b, high_b) = (wilson(share * trials, trials, quantile) for share, trials in (a, b))

    def joined(one: float, other: float) -> float:
        return sqrt(max(0.0, one * one - 2 * correlation * one * other + other * other))

    value = b[0] - a[0]
    return value - joined(b[0] - low_b, high_a - a[0]), value + joined(high_b - b[0], a[0] - low_a)


class _Limits:
    """The interval of a difference of shares at any quantile, as the head of this file has it."""

    def __init__(self, shares: Shares, paired: bool) -> None:
        self.a, self.b = float(shares.a.mean()), float(shares.b.mean())
        self.trials_a = effective_trials(shares.a.tolist(), int(shares.samples_a.sum()))
        self.trials_b = effective_trials(shares.b.tolist(), int(shares.samples_b.sum()))
        self.correlation = self._corrected(shares) if paired else 0.0
        spread = (shares.b - shares.a).var(ddof=1) if paired else shares.a.var(ddof=1) + shares.b.var(ddof=1)
        self.error = sqrt(float(spread) / len(shares.a))

    def at(self, quantile: float) -> tuple[float, float]:
        """Lower and upper end."""
        low, high = recovered((self.a, self.trials_a), (self.b, self.trials_b), self.correlation, quantile)
        value, half = self.b - self.a, quantile * self.error
        return max(-1.0, min(low, value - half)), min(1.0, max(high, value + half))

    def _corrected(self, shares: Shares) -> float:
        """The correlation less half a sample's worth, and not below zero for it: where all agree, others might not.

        A problem's samples that all say the same count as one (those of a problem are 1 + (samples - 1) (1 - ICC), with
        the ICC that the effective number of trials says): with one sample it is Newcombe's correction of phi.
        """
        correlation, spread = shares.correlation, sqrt(self.a * (1 - self.a) * self.b * (1 - self.b))
        if correlation <= 0 or spread < 1e-12:
            return correlation
        problems = len(shares.a)
        apart_a = problems + float(shares.samples_a.sum()) * (1 - problems / self.trials_a)
        apart_b = problems + float(shares.samples_b.sum()) * (1 - problems / self.trials_b)
        return max(0.0, correlation - 0.5 / sqrt(apart_a * apart_b) / spread)

    def p_value(self, freedom: int) -> float:
        """1 minus the level that just reaches zero, by halving; on that side of 5% which the 95% interval says."""

        def reaches(quantile: float) -> bool:
            low, high = self.at(quantile)
            return low <= 0 <= high

        usual = t_quantile(freedom)
        outside, inside = (0.0, usual) if reaches(usual) else (usual, _LARGEST_T)
        if reaches(outside) or not reaches(inside):
            return t_outside(outside if reaches(outside) else inside, freedom)
        for _ in range(60):
            middle = (outside + inside) / 2
            outside, inside = (outside, middle) if reaches(middle) else (middle, inside)
        return t_outside(inside, freedom)


def mean_difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """The difference of two means over the same problems, of what has no bounds (lengths): Student's paired t."""
    first, second = np.asarray(a, float), np.asarray(b, float)
    mean_a, mean_b, problems = float(first.mean()), float(second.mean()), len(first)
    if problems < 2:
        return Difference(mean_a, mean_b, None, None)
    error = float((second - first).std(ddof=1)) / sqrt(problems)
    value, half = mean_b - mean_a, t_quantile(problems - 1) * error
    p = t_outside(abs(value) / error, problems - 1) if error > 0 else float(value == 0)
    return Difference(mean_a, mean_b, (value - half, value + half), p)


def holm(values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for how many there are (Holm 1979); None stays, and doesn't count."""
    known = sorted((value, place) for place, value in enumerate(values) if value is not None)
    corrected: list[float | None] = [None] * len(values)
    largest = 0.0
    for rank, (value, place) in enumerate(known):
        largest = max(largest, min(1.0, value * (len(known) - rank)))
        corrected[place] = largest
    return corrected


# ---- what it takes to see a difference ----


@dataclass(frozen=True)
class Detectable:
    """What differences are seen at the 5% level with 80% power (normal approximation; Miller 2024).

    Attributes:
        smallest: the smallest one with these problems and samples; None where nothing varied.
        size: the one that was asked for, or None; then all below are None.
        problems: how many problems show it, with as many samples of each as there are.
        samples: how many samples of each of these problems show it; None where no number does.
        known: whether samples and problems could be told apart: each problem has two samples or more of both models.
    """

    smallest: float | None
    size: float | None
    problems: int | None
    samples: int | None
    known: bool

    def as_json(self) -> dict[str, Any]:
        """As `sft compare --json` has it."""
        asked = {"size": self.size, "problems": self.problems, "samples_per_problem": self.samples}
        return {"smallest_detectable": self.smallest, **({"detect": asked} if self.size is not None else {})}


def detectable(shares: Shares, size: float | None = None) -> Detectable:
    """What can be seen. The variance of a problem's difference is its own, and that of one sample / their number."""
    problems = len(shares.a)
    known = bool(min(shares.samples_a.min(), shares.samples_b.min()) > 1)
    one_a, one_b = (_one_sample(*side) for side in ((shares.a, shares.samples_a), (shares.b, shares.samples_b)))
    noise = float((one_a / shares.samples_a + one_b / shares.samples_b).mean()) if known else 0.0
    # What the samples alone make is a part of it, whatever was drawn.
    variance = max(noise, float((shares.b - shares.a).var(ddof=1))) if problems > 1 else 0.0
    if variance < 1e-12:
        return Detectable(None, size, None, None, known)
    smallest = _Z_SUM * sqrt(variance / problems)
    if size is None:
        return Detectable(smallest, None, None, None, known)
    wanted = problems * (size / _Z_SUM) ** 2
    samples = None
    if known:
        left = wanted - (variance - noise)
        samples = max(1, ceil(float((one_a + one_b).mean()) / left)) if left > 0 else None
    return Detectable(smallest, size, max(2, ceil(variance * (_Z_SUM / size) ** 2)), samples, known)


def _one_sample(shares: Values, samples: NDArray[np.int64]) -> Values:
    """The variance of one sample of each problem, without bias; of a single one nothing is known."""
    return np.asarray(shares * (1 - shares) * samples / np.maximum(samples - 1, 1), float)


# ---- Student's t ----


@lru_cache(maxsize=4096)
def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """What |t| stays below with probability `level`."""
    low, high = 0.0, _LARGEST_T
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_outside(middle, freedom) > 1 - level else (low, middle)
    return (low + high) / 2


def t_outside(value: float, freedom: int) -> float:
    """The probability that |t| is larger, exact for whole degrees of freedom (Abramowitz and Stegun 26.7.3, 26.7.4)."""
    if freedom < 1 or not isfinite(value):
        raise ValueError(f"Student's t needs a number and 1 degree of freedom or more, not {value} and {freedom}")
    angle = atan2(abs(value), sqrt(freedom))
    odd = freedom % 2
    steps = np.arange(2 + odd, freedom - 1, 2, dtype=float)
    terms = 1 + np.cumprod(cos(angle) ** 2 * (steps - 1) / steps).sum()
    inside = 2 / pi * (angle + (sin(angle) * cos(angle) * terms if freedom > 1 else 0.0)) if odd else sin(angle) * terms
    return float(min(1.0, max(0.0, 1 - inside)))
