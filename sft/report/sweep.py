"""What a sweep came to: the numbers of each point, the means of points that differ by seed alone, and the best."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from sft.evaluate.intervals import Estimate, over_runs
from sft.recipe.grid import Axis, Grid, Point, shown
from sft.recipe.problems import nearest
from sft.recipe.schema import Recipe
from sft.utils.errors import UsageError

LOSS = "loss"
"""The metric of held-out rows."""


@dataclass(frozen=True)
class Metric:
    """What points are compared by, after the last stage: a suite's pass@k, or (no suite) the held-out rows' loss."""

    suite: str | None
    k: int = 1

    def __str__(self) -> str:
        return LOSS if self.suite is None else f"{self.suite}:pass@{self.k}"


@dataclass
class Outcome:
    """One point: metrics by suite and the held-out loss after its last stage, or the sentence that it failed with."""

    point: Point
    suites: dict[str, dict[str, Any]] = field(default_factory=dict)
    loss: float | None = None
    error: str | None = None


@dataclass
class Setting:
    """The points that differ by seed alone. `score` is None where one of them failed."""

    values: dict[str, Any]
    outcomes: list[Outcome]
    score: float | None

    def estimate(self, suite: str) -> Estimate | None:
        """pass@1 over the points that have it."""
        runs = [estimate_of(found) for outcome in self.outcomes if (found := outcome.suites.get(suite))]
        return over_runs(runs) if runs else None

    @property
    def loss(self) -> float | None:
        """The mean of the held-out losses that there are."""
        losses = [outcome.loss for outcome in self.outcomes if outcome.loss is not None]
        return sum(losses) / len(losses) if losses else None


@dataclass
class Sweep:
    """A sweep that has ended."""

    grid: Grid
    metric: Metric
    settings: list[Setting]

    @property
    def suites(self) -> list[str]:
        """The suites of the last stage that any point has numbers of."""
        return list(dict.fromkeys(name for outcome in self.outcomes for name in outcome.suites))

    @property
    def outcomes(self) -> list[Outcome]:
        """Those of all points, a setting's together."""
        return [outcome for setting in self.settings for outcome in setting.outcomes]

    @property
    def seeds(self) -> list[Axis]:
        """The axes in which a setting's points differ."""
        return [axis for axis in self.grid.axes if axis.is_seed]

    @property
    def best(self) -> Setting | None:
        """The setting with the best score, of equal ones the first; those of which a point failed don't count."""
        scored = [setting for setting in self.settings if setting.score is not None]
        sign = 1 if self.metric.suite is None else -1
        return min(scored, key=lambda setting: sign * (setting.score or 0.0), default=None)

    @property
    def best_point(self) -> Point | None:
        """The best setting's first point: which seed was the luckiest says nothing of a recipe."""
        return self.best.outcomes[0].point if self.best else None


def estimate_of(metrics: dict[str, Any]) -> Estimate:
    """A suite's pass@1."""
    low, high = metrics["interval"]
    return Estimate(metrics["pass_at_1"], low, high, metrics["problems"], metrics["samples"])


def choose_metric(text: str | None, recipes: Sequence[Recipe]) -> Metric:
    """What `--metric` means for these recipes; without it the last stage's first suite, or its held-out rows' loss.

    Raises UsageError for what some of them won't have.
    """
    if text is None:
        suites, held = recipes[0].stages[-1].evaluate.suites, recipes[0].stages[-1].data.validation
        if not suites and held is None:
            reason = "the last stage has nothing to compare by: give it a suite (`evaluate`) or held-out rows"
            raise UsageError(f"{reason} (`data.validation`)")
        text = f"{suites[0].name}:pass@1" if suites else LOSS
    if text == LOSS:
        if any(recipe.stages[-1].data.validation is None for recipe in recipes):
            raise UsageError("--metric loss: the last stage has no held-out rows; set its data.validation")
        return Metric(None)
    match = re.fullmatch(r"(?P<suite>[A-Za-z0-9._-]+)(:pass@(?P<k>[1-9][0-9]{0,5}))?", text)
    if match is None:
        raise UsageError(f"--metric {text}: is written SUITE:pass@1, or {LOSS} for that of held-out rows")
    metric = Metric(match["suite"], int(match["k"] or 1))
    for recipe in recipes:
        _check_suite(metric, recipe)
    return metric


def _check_suite(metric: Metric, recipe: Recipe) -> None:
    stage = recipe.stages[-1]
    samples = {suite.name: suite.samples_per_problem for suite in stage.evaluate.suites}
    name = str(metric.suite)
    if name not in samples:
        hint = nearest(name, samples) or f"; its suites are: {', '.join(samples) or 'none'}"
        raise UsageError(f"--metric {metric}: the last stage, {stage.name}, has no suite {name}{hint}")
    # What `metrics.json` holds: 1, 2, 4, ... up to the number of samples.
    if metric.k > samples[name] or metric.k & (metric.k - 1):
        known = ", ".join(f"pass@{1 << power}" for power in range(samples[name].bit_length()))
        raise UsageError(f"--metric {metric}: with samples_per_problem {samples[name]} the suite has {known}")


def summarize_sweep(grid: Grid, outcomes: Sequence[Outcome], metric: Metric) -> Sweep:
    """The sweep, its points gathered to settings in the grid's order."""
    drawn = {axis.label for axis in grid.axes if axis.is_seed}
    groups: dict[str, tuple[dict[str, Any], list[Outcome]]] = {}
    for outcome in outcomes:
        values = {label: value for label, value in outcome.point.values.items() if label not in drawn}
        groups.setdefault(repr(values), (values, []))[1].append(outcome)
    settings = [Setting(values, members, _score(members, metric)) for values, members in groups.values()]
    return Sweep(grid, metric, settings)


def _score(outcomes: Sequence[Outcome], metric: Metric) -> float | None:
    found = [_value(outcome, metric) for outcome in outcomes]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if len(values) == len(found) else None


def _value(outcome: Outcome, metric: Metric) -> float | None:
    if metric.suite is None:
        return outcome.loss
    metrics = outcome.suites.get(metric.suite)
    if metrics is None:
        return None
    return float(metrics["pass_at_1"] if metric.k == 1 else metrics["pass_at_k"][str(metric.k)])


# ---- as rows, and as JSON ----


def table(sweep: Sweep) -> tuple[list[str], list[list[str]]]:
    """Head and rows: each point with its swept values, its suites with intervals, and what became of it.

    Where a seed is swept, a setting's mean follows its points.
    """
    held = any(outcome.loss is not None for outcome in sweep.outcomes)
    labels = [axis.label for axis in sweep.grid.axes]
    head = [*labels, *sweep.suites, *(["held-out loss"] if held else []), ""]
    rows = []
    for setting in sweep.settings:
        mark = "best" if setting is sweep.best else ""
        for outcome in setting.outcomes:
            values = [shown(outcome.point.values[label]) for label in labels]
            state = "failed" if outcome.error else "" if sweep.seeds else mark
            estimates = [_estimated(outcome.suites.get(suite)) for suite in sweep.suites]
            rows.append([*values, *map(_cell, estimates), *([_loss(outcome.loss)] if held else []), state])
        if sweep.seeds:
            known = [outcome for outcome in setting.outcomes if outcome.error is None]
            values = [shown(setting.values[label]) if label in setting.values else "" for label in labels]
            values[labels.index(sweep.seeds[0].label)] = f"mean of {len(known)}"
            estimates = [setting.estimate(suite) for suite in sweep.suites]
            rows.append([*values, *map(_cell, estimates), *([_loss(setting.loss)] if held else []), mark])
    return head, rows


def _estimated(metrics: dict[str, Any] | None) -> Estimate | None:
    return estimate_of(metrics) if metrics else None


def _cell(estimate: Estimate | None) -> str:
    return "\u2013" if estimate is None else f"{estimate.value:.1%} ({estimate.low:.1%} to {estimate.high:.1%})"


def _loss(loss: float | None) -> str:
    return "\u2013" if loss is None else f"{loss:.4f}"


def as_json(sweep: Sweep) -> dict[str, Any]:
    """All of it for machines."""
    best = sweep.best
    return {
        "recipe": sweep.grid.points[0].recipe.name,
        "metric": str(sweep.metric),
        "axes": {axis.key: list(axis.values) for axis in sweep.grid.axes},
        "points": list(_points(sweep)),
        "settings": [
            {
                "values": setting.values,
                "points": [outcome.point.name for outcome in setting.outcomes],
                "score": setting.score,
                "suites": {
                    suite: estimate.as_json()
                    for suite in sweep.suites
                    if (estimate := setting.estimate(suite)) is not None
                },
                "loss": setting.loss,
            }
            for setting in sweep.settings
        ],
        "best": None if best is None else {"values": best.values, "point": best.outcomes[0].point.name},
    }


def _points(sweep: Sweep) -> Iterator[dict[str, Any]]:
    for outcome in sweep.outcomes:
        yield {
            "name": outcome.point.name,
            "values": outcome.point.values,
            "suites": {name: estimate_of(found).as_json() for name, found in outcome.suites.items()},
            "loss": outcome.loss,
            "error": outcome.error,
        }
