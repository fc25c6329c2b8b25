"""Accuracy from samples: pass@1 and pass@k with intervals that respect that a problem's samples go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, sqrt
from typing import Any

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Estimate:
    """A share between 0 and 1, the ends of its 95% interval, and from how many problems and samples it comes."""

    value: float
    low: float
    high: float
    problems: int
    samples: int

    def as_json(self) -> dict[str, Any]:
        """As metrics.json and a sweep's results have it."""
        return {
            "pass_at_1": self.value,
            "interval": [self.low, self.high],
            "problems": self.problems,
            "samples": self.samples,
        }


def wilson(successes: float, trials: float, z: float = Z95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson 1927); `trials` may be an effective number. (0, 1) for none."""
    if trials <= 0:
        return 0.0, 1.0
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half) if share > 0 else 0.0, min(1.0, middle + half) if share < 1 else 1.0


def pass_at_1(outcomes: Sequence[Sequence[bool]]) -> Estimate:
    """The mean over problems of the share of right samples, with a 95% Wilson interval.

    `outcomes` holds each problem's samples. Samples of one problem are alike, so they count for less than as many
    problems: the interval is Wilson's at as many trials as `effective_trials` says. With one sample a problem it is the
    plain Wilson interval.
    """
    shares = [sum(samples) / len(samples) for samples in outcomes if samples]
    problems, samples = len(shares), sum(map(len, outcomes))
    if not problems:
        return Estimate(0.0, 0.0, 1.0, 0, 0)
    mean, effective = sum(shares) / problems, effective_trials(shares, samples)
    low, high = wilson(mean * effective, effective)
    return Estimate(mean, low, high, problems, samples)


def effective_trials(shares: Sequence[float], samples: int) -> float:
    """As how many independent samples the mean of the problems' shares is worth, of `samples` in all: p(1-p) / SE^2.

    SE comes from the spread between problems (Korn and Graubard 1998); it is kept between problems and samples.
    """
    problems, mean = len(shares), sum(shares) / len(shares)
    if problems < 2 or not 0 < mean < 1:
        return float(problems)
    variance = sum((share - mean) ** 2 for share in shares) / (problems - 1) / problems
    effective = mean * (1 - mean) / variance if variance > 0 else float(samples)
    return min(max(effective, problems), samples)


def over_runs(runs: Sequence[Estimate]) -> Estimate:
    """The mean of several runs' shares on the same problems, with a 95% interval; one run's is as it is.

    More runs don't make more problems: the variance of the mean is that of one run, p(1-p) / problems, and the spread
    between the runs, s^2 / runs, and the interval is Wilson's at as many trials as give that variance. So it is never
    narrower than for one run with a sample a problem, and it covers other problems as well as other seeds.
    """
    if len(runs) == 1:
        return runs[0]
    mean = sum(run.value for run in runs) / len(runs)
    problems = min(run.problems for run in runs)
    spread = sum((run.value - mean) ** 2 for run in runs) / (len(runs) - 1) / len(runs)
    plain = mean * (1 - mean)
    trials = plain / (plain / problems + spread) if plain and problems else float(problems)
    low, high = wilson(mean * trials, trials)
    return Estimate(mean, low, high, problems, sum(run.samples for run in runs))


def pass_at_k(outcomes: Sequence[Sequence[bool]], k: int) -> float:
    """The chance that one of k samples is right: 1 - C(n-c, k) / C(n, k), averaged over problems (Chen et al. 2021).

    Raises ValueError when a problem has fewer than k samples.
    """
    if not outcomes or k < 1 or any(len(samples) < k for samples in outcomes):
        raise ValueError(f"pass@{k} needs at least {k} samples of every problem")
    total = 0.0
    for samples in outcomes:
        n, right = len(samples), sum(samples)
        total += 1 - comb(n - right, k) / comb(n, k)
    return total / len(outcomes)


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie, linearly between neighbours. ValueError for none."""
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    left = int(place)
    right = min(left + 1, len(ordered) - 1)
    return ordered[left] + (ordered[right] - ordered[left]) * (place - left)
