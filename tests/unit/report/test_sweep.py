"""What a sweep came to: means over seeds with their intervals, the best, the table and the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sft.evaluate.intervals import Estimate, over_runs, pass_at_1, wilson
from sft.recipe.grid import Grid, load_grid
from sft.report.sweep import Metric, Outcome, Sweep, as_json, choose_metric, summarize_sweep, table
from sft.report.sweep_page import draw_sweep, verdict, write_sweep_page
from sft.utils.errors import UsageError

RECIPE = """\
name: r
output_dir: out
model: {tokenizer: tiny, config: {hidden_size: 64}}
stages:
  - name: one
    data: {sources: [{path: rows.jsonl}], validation: {size: 2}}
    evaluate: {suites: [{name: early, source: {path: a.jsonl}}]}
  - name: two
    data: {sources: [{path: rows.jsonl}]}
    evaluate:
      suites:
        - {name: short, source: {path: a.jsonl}, samples_per_problem: 4}
        - {name: long, source: {path: a.jsonl}}
"""
RATES = ("--stages.two.train.learning_rate", "1e-5,2e-5")
SEEDS = ("--defaults.train.seed", "1,2")


@pytest.fixture
def grid(in_tmp: Path) -> Callable[..., Grid]:
    Path("r.yaml").write_text(RECIPE)
    return lambda *words: load_grid("r.yaml", words)


def metrics(share: float, problems: int = 200) -> dict[str, Any]:
    low, high = wilson(share * problems, problems)
    return {
        "pass_at_1": share,
        "interval": [low, high],
        "problems": problems,
        "samples": problems,
        "pass_at_k": {"2": 1 - share, "4": share},
    }


def swept(grid: Grid, shares: Sequence[float | None], metric: Metric | None = None) -> Sweep:
    """A sweep whose points got these shares of `short`; None: failed."""
    outcomes = [
        Outcome(point, error="it broke") if share is None else Outcome(point, {"short": metrics(share)}, loss=1 - share)
        for point, share in zip(grid.points, shares, strict=True)
    ]
    return summarize_sweep(grid, outcomes, metric or Metric("short"))


# ---- means ----


def estimate(share: float, problems: int = 100) -> Estimate:
    return Estimate(share, *wilson(share * problems, problems), problems, problems)


def test_one_run_is_as_it_is() -> None:
    run = Estimate(0.5, 0.4, 0.6, 100, 400)
    assert over_runs([run]) == run


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_equal_runs_on_the_same_problems_tell_no_more_than_one(share: float) -> None:
    mean = over_runs([estimate(share)] * 3)
    assert (mean.value, mean.low, mean.high) == pytest.approx((share, *wilson(100 * share, 100)))
    assert (mean.problems, mean.samples) == (100, 300)


def test_the_spread_between_runs_widens_the_interval() -> None:
    """The variance is p(1-p)/problems + s^2/runs, here with s^2 = 0.02 and two runs."""
    mean = over_runs([estimate(0.5), estimate(0.7)])
    trials = 0.24 / (0.24 / 100 + 0.01)
    assert (mean.value, mean.low, mean.high) == pytest.approx((0.6, *wilson(0.6 * trials, trials)))
    narrow = over_runs([estimate(0.59), estimate(0.61)])
    assert mean.low < narrow.low < 0.6 < narrow.high < mean.high
    assert narrow.low <= estimate(0.6).low and narrow.high >= estimate(0.6).high


def test_the_interval_of_a_mean_holds_the_truth_as_often_as_it_says() -> None:
    """Problems of different difficulty, asked in each of three runs whose skill differs: 95% intervals."""
    import numpy as np

    rng, held, trials = np.random.default_rng(0), 0, 400
    for _ in range(trials):
        difficulty = rng.uniform(0.2, 0.8, 80)
        skill = rng.normal(0, 0.05, (3, 1))
        right = rng.random((3, 80)) < np.clip(difficulty + skill, 0, 1)
        mean = over_runs([pass_at_1([[bool(one)] for one in run]) for run in right])
        held += mean.low <= 0.5 <= mean.high
    assert held / trials > 0.93


def test_points_that_differ_by_seed_alone_are_averaged(grid: Callable[..., Grid]) -> None:
    sweep = swept(grid(*SEEDS, *RATES), [0.2, 0.5, 0.4, 0.3])
    assert [(s.values, s.score) for s in sweep.settings] == [
        ({"learning_rate": 1e-5}, pytest.approx(0.3)),
        ({"learning_rate": 2e-5}, pytest.approx(0.4)),
    ]
    assert sweep.best is sweep.settings[1]
    assert sweep.best_point is not None and sweep.best_point.values == {"learning_rate": 2e-5, "seed": 1}


def test_of_equal_settings_the_first_is_the_best(grid: Callable[..., Grid]) -> None:
    assert swept(grid(*RATES), [0.4, 0.4]).best_point.name == "learning_rate=1e-05"


def test_a_setting_with_a_failed_run_is_not_the_best(grid: Callable[..., Grid]) -> None:
    sweep = swept(grid(*RATES, *SEEDS), [0.9, None, 0.4, 0.3])
    assert sweep.best is sweep.settings[1] and sweep.settings[0].score is None
    nothing = swept(grid(*RATES), [None, None])
    assert nothing.best is None and nothing.best_point is None and draw_sweep(nothing) is None
    assert verdict(nothing) == "No setting has all its numbers, so none is the best."


def test_other_metrics(grid: Callable[..., Grid]) -> None:
    for metric, best in ((Metric("short", 2), 0), (Metric("short", 4), 1), (Metric(None), 1)):
        sweep = swept(grid(*RATES), [0.2, 0.4], metric)
        assert sweep.best is sweep.settings[best], metric


# ---- what may be asked ----


METRICS = [(None, Metric("short")), ("long", Metric("long")), ("short:pass@4", Metric("short", 4))]


@pytest.mark.parametrize(("text", "metric"), METRICS)
def test_what_a_metric_means(grid: Callable[..., Grid], text: str | None, metric: Metric) -> None:
    assert choose_metric(text, [point.recipe for point in grid(*RATES).points]) == metric


def test_without_a_suite_the_held_out_loss_counts(grid: Callable[..., Grid]) -> None:
    words = (*RATES, "--stages.two.evaluate.suites", "[]", "--stages.two.data.validation", "{size: 2}")
    recipes = [point.recipe for point in grid(*words).points]
    assert choose_metric(None, recipes) == choose_metric("loss", recipes) == Metric(None)


REFUSED = [
    ("shrt", "--metric shrt:pass@1: the last stage, two, has no suite shrt, did you mean short?"),
    ("early", "--metric early:pass@1: the last stage, two, has no suite early; its suites are: short, long"),
    ("short:pass@8", "--metric short:pass@8: with samples_per_problem 4 the suite has pass@1, pass@2, pass@4"),
    ("short:pass@3", "--metric short:pass@3: with samples_per_problem 4 the suite has pass@1"),
    ("long:pass@2", "--metric long:pass@2: with samples_per_problem 1 the suite has pass@1"),
    ("short:accuracy", "--metric short:accuracy: is written SUITE:pass@1, or loss"),
    ("loss", "--metric loss: the last stage has no held-out rows"),
]


@pytest.mark.parametrize(("text", "sentence"), REFUSED)
def test_a_metric_that_no_run_will_have_is_refused(grid: Callable[..., Grid], text: str, sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose_metric(text, [point.recipe for point in grid(*RATES).points])
    assert str(caught.value).startswith(sentence)


def test_a_recipe_that_measures_nothing_is_refused(grid: Callable[..., Grid]) -> None:
    recipes = [point.recipe for point in grid(*RATES, "--stages.two.evaluate.suites", "[]").points]
    with pytest.raises(UsageError, match="the last stage has nothing to compare by"):
        choose_metric(None, recipes)


# ---- table, JSON, page ----


def test_the_table_has_each_point_and_each_mean(grid: Callable[..., Grid]) -> None:
    head, rows = table(swept(grid(*RATES, *SEEDS), [0.5, 0.5, None, 0.25]))
    assert head == ["learning_rate", "seed", "short", "held-out loss", ""]
    assert rows[0][:2] == ["1e-05", "1"] and rows[0][2].startswith("50.0% (") and rows[0][3:] == ["0.5000", ""]
    assert [row[1] for row in rows] == ["1", "2", "mean of 2", "1", "2", "mean of 1"]
    assert [row[-1] for row in rows] == ["", "", "best", "failed", "", ""]
    assert rows[3][2:4] == ["\u2013", "\u2013"]


def test_without_seeds_there_are_no_means(grid: Callable[..., Grid]) -> None:
    _, rows = table(swept(grid(*RATES), [0.5, 0.25]))
    assert [(row[0], row[-1]) for row in rows] == [("1e-05", "best"), ("2e-05", "")]


def test_json_tells_all_of_it(grid: Callable[..., Grid]) -> None:
    told = json.loads(json.dumps(as_json(swept(grid(*RATES, *SEEDS), [0.5, 0.5, None, 0.25]))))
    assert told["axes"] == {"stages.two.train.learning_rate": [1e-5, 2e-5], "defaults.train.seed": [1, 2]}
    assert told["best"] == {"values": {"learning_rate": 1e-5}, "point": "learning_rate=1e-05,seed=1"}
    assert [point["error"] for point in told["points"]] == [None, None, "it broke", None]
    assert told["settings"][0]["suites"]["short"]["pass_at_1"] == 0.5 and told["settings"][1]["score"] is None


def test_the_page_shows_the_figure_the_table_and_the_recipe(grid: Callable[..., Grid]) -> None:
    words = (*RATES, *SEEDS, "--description", "<b>,x", "--variables.hf_token", "hf_abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(UsageError, match="hf_token"):
        grid(*words)
    sweep = swept(grid(*words[:-2]), [0.5, 0.1, 0.5, None, 0.9, 0.2, 0.9, 0.2])
    page = write_sweep_page(sweep)
    text = page.read_text()
    assert page == Path("out/sweep.html") and text.count("<svg") == 2
    assert not re.search(r"(src|href)=.?http", text), "it needs nothing else"
    assert "Best by short:pass@1: learning_rate 2e-05, description &lt;b&gt; with 90.0%, the mean of 2 runs." in text
    assert "<b>x" not in text and "learning_rate: 2.0e-05" in text and "it broke" in text
    figure = draw_sweep(sweep)
    assert figure is not None
    assert [axis.get_title() for axis in figure.axes] == ["short"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["1e-05", "2e-05"]
    drawn = {line.get_label(): list(line.lines[0].get_ydata()) for line in figure.axes[0].containers}
    assert drawn == {"description <b>": pytest.approx([50, 90]), "description x": pytest.approx([10, 20])}


def test_a_sweep_of_losses_alone_is_drawn(grid: Callable[..., Grid]) -> None:
    made = grid(*RATES)
    outcomes = [Outcome(point, loss=loss) for point, loss in zip(made.points, (2.0, 1.0), strict=True)]
    sweep = summarize_sweep(made, outcomes, Metric(None))
    figure = draw_sweep(sweep)
    assert figure is not None and list(figure.axes[0].lines[0].get_ydata()) == [2.0, 1.0]
    assert verdict(sweep) == "Best by loss: learning_rate 2e-05 with 1.0000."
