"""What can be read off a figure is what was measured; marks explain the dips of the throughput."""

from __future__ import annotations

import itertools
import json
import re
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from report_toys import STAGES, Page, make_recipe, write_stage, write_suite

from sft.recipe import Recipe, RunPaths
from sft.report import write_report
from sft.report.chart import chart
from sft.report.collect import collect
from sft.report.drawing import as_chart, as_svg, drawing, panels
from sft.report.figures import FIGURES, length_bins
from sft.report.readings import Panel, Reading, Series, readings, table_of, thinned
from sft.train.callbacks import EventsFile


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = make_recipe(tmp_path / "run")
    paths = RunPaths(recipe)
    write_suite(paths, "start")
    for name in STAGES[:2]:
        write_stage(paths, name)
        write_suite(paths, name)
    return recipe


def read(recipe: Recipe, name: str, narrow: bool = False) -> list[Panel]:
    with drawing(narrow=narrow):
        figure = FIGURES[name][0](collect(recipe, RunPaths(recipe)))
        as_svg(figure)
        return readings(figure)


def series_of(panel: Panel) -> dict[str, list[Reading]]:
    return {series.label: series.points for series in panel.series}


@pytest.mark.parametrize("narrow", [False, True])
def test_readings_are_what_was_measured(recipe: Recipe, narrow: bool) -> None:
    run = collect(recipe, RunPaths(recipe))
    (accuracy,) = read(recipe, "accuracy", narrow)
    for point in series_of(accuracy)["all"]:
        metrics: Any = run.metrics(point.where, "held-out")
        value, low, high = map(float, re.findall(r"[\d.]+", point.value))
        assert (value, low, high) == pytest.approx(
            [100 * metrics["pass_at_1"], *(100 * end for end in metrics["interval"])], rel=1e-3
        )
    assert [point.where for point in series_of(accuracy)["arithmetic"]] == ["start", "broad", "hard"]
    losses = {panel.title: series_of(panel)["loss"] for panel in read(recipe, "loss", narrow)}
    log = {f"step {entry['step']}": entry["loss"] for entry in run.stages[0].log}
    assert {point.where: float(point.value) for point in losses["broad"]} == pytest.approx(log, rel=1e-3)
    counts = {panel.title: series_of(panel) for panel in read(recipe, "lengths", narrow)}
    for point in ("start", "broad", "hard"):
        found = {label: sum(int(one.value) for one in points) for label, points in counts[point].items()}
        verdicts: Any = (run.metrics(point, "held-out") or {})["verdicts"]
        assert found["right"] == verdicts["right"] and sum(found.values()) == 200


def test_places_lie_in_their_panels_and_panels_beside_or_below(recipe: Recipe) -> None:
    for name in ("accuracy", "steps", "loss", "lengths", "throughput"):
        for narrow in (False, True):
            found = read(recipe, name, narrow)
            for panel in found:
                left, top, right, bottom = panel.box
                assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
                for point in (point for series in panel.series for point in series.points):
                    assert left - 0.01 <= point.x <= right + 0.01 and top - 0.01 <= point.y <= bottom + 0.01
            boxes = [panel.box for panel in found]
            assert len({box[0] for box in boxes}) == (1 if narrow else len(boxes))


def test_a_long_log_gives_a_page_of_ordinary_size(recipe: Recipe) -> None:
    assert thinned(range(10), 20) == list(range(10))
    few = thinned(range(100_000), 240)
    assert len(few) == 240 and few[0] == 0 and few[-1] == 99_999 and few == sorted(set(few))
    write_stage(RunPaths(recipe), "broad", steps=5000)
    assert all(len(points) <= 240 for panel in read(recipe, "loss") for points in series_of(panel).values())


def test_values_stand_in_a_table_too(recipe: Recipe) -> None:
    (panel,) = read(recipe, "accuracy")
    head, rows = table_of(panel)
    assert head == ["", "all", "arithmetic", "words"] and [row[0] for row in rows] == ["start", "broad", "hard"]
    page = Page(write_report(recipe, RunPaths(recipe)).read_text())
    for row in rows:
        assert all(cell in page.text for cell in row)


def test_marks_explain_the_dips(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    events = [("checkpoint", 20), ("checkpoint", 40), ("restart", 40), ("checkpoint", 119), ("checkpoint", 20)]
    lines = [json.dumps({"step": step, "event": event}) for event, step in events]
    paths.events("broad").write_text("\n".join([*lines, '{"torn']) + "\n")
    (panel,) = read(recipe, "throughput")
    found = series_of(panel)
    assert set(found) == {"broad", "hard", "checkpoint", "restart"} and "Marks" not in found
    # On the log step after each, which took longer; a mark has a place and no value. After the last step none follows.
    at = {point.where: (point.x, point.y) for point in found["broad"]}
    assert len(found["checkpoint"]) == 2 and len(found["restart"]) == 1
    for point in found["checkpoint"] + found["restart"]:
        assert point.value == "" and at[point.where] == (point.x, point.y)
    with drawing():
        figure = FIGURES["throughput"][0](collect(recipe, paths))
    labels = figure.axes[0].get_legend_handles_labels()[1]
    # The start, and the stage before the second, were evaluated: one entry for both.
    assert labels.count("evaluation") == 1 and "restart" in labels
    rules = [line for line in figure.axes[0].lines if list(line.get_ydata()) == [0, 1]]
    assert [line.get_xdata()[0] for line in rules] == pytest.approx([0.0, 0.5 * 119 / 60])


def test_training_notes_its_checkpoints_and_starts(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    notes: Any = EventsFile(path)

    def state(step: int, first: bool = True) -> Any:
        return SimpleNamespace(global_step=step, is_world_process_zero=first)

    notes.on_train_begin(None, state(0), None)
    notes.on_save(None, state(10), None)
    notes.on_save(None, state(10, first=False), None)
    notes.on_train_begin(None, state(10), None)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 10, "event": "checkpoint"}, {"step": 10, "event": "restart"}
    ]  # fmt: skip


def test_no_name_breaks_out_of_the_chart() -> None:
    hostile = "</script><script>alert(1)</script>"
    panel = Panel(hostile, (0, 0, 1, 1), [Series(hostile, "#123456", [Reading(0.5, 0.5, hostile, hostile)])])
    layout = ("<svg width='1'></svg>", [panel])
    text = chart(hostile, layout, layout)
    page = Page(text)
    assert page.open == [] and text.count("<script") == 2 == text.count("</script")
    data = json.loads(re.findall(r'application/json">(.*?)</script>', text)[0])
    assert data[0]["series"][0]["points"] == [[0.5, 0.5, hostile, hostile]]
    assert unescape(text).count(hostile) > 2


def test_a_figure_without_values_to_read_off_is_an_image_with_a_name() -> None:
    def draw(source: Any) -> Any:
        figure, (axis,) = panels(1)
        axis.barh([0, 1], [3, 4])
        return figure

    made = as_chart(draw, None, "Bars & <so on>.")
    assert made is not None
    html, png, caption = made
    assert html.count('role="img" aria-label="Bars &amp; &lt;so on&gt;."') == 2 and "tabindex" not in html
    assert png.startswith(b"\x89PNG") and caption == "Bars & <so on>."
    assert as_chart(lambda source: None, None, "") is None


@pytest.mark.parametrize("lengths", [[200] * 6, [1, 1], [1, 2], [199, 200, 201], [5, 4000]])
def test_a_bar_of_lengths_is_wide_enough_to_be_seen(lengths: list[int]) -> None:
    from math import log

    edges = length_bins(lengths)
    assert edges[0] <= min(lengths) and max(lengths) < edges[-1] and edges == sorted(edges)
    # A log axis from a tenth below the first edge to a tenth above the last: a bar takes at least a hundredth of it.
    axis = log(edges[-1] * 1.1) - log(edges[0] / 1.1)
    assert all((log(b) - log(a)) / axis > 0.01 for a, b in itertools.pairwise(edges))


def test_accuracy_and_entropy_of_trained_tokens_are_shown_where_they_are_known(recipe: Recipe) -> None:
    """Of all and of each source; a stage without them has no panel."""
    paths = RunPaths(recipe)
    run = collect(recipe, paths)
    for name in ("token_accuracy", "entropy"):
        assert FIGURES[name][0](run) is None
    numbers = {"mean_token_accuracy": 0.5, "mean_token_accuracy/web": 0.25, "entropy": 2.0, "entropy/web": 3.0}
    lines = [{"step": step, "loss": 1.0, **{key: value / step for key, value in numbers.items()}} for step in (1, 2)]
    run.stages[1].log = [*lines, {"step": 3, "eval_loss": 1.0}]
    with drawing():
        for name, all_of_it, web in (("token_accuracy", (50, 25), (25, 12.5)), ("entropy", (2, 1), (3, 1.5))):
            figure = FIGURES[name][0](run)
            as_svg(figure)
            (panel,) = readings(figure)
            assert panel.title == "hard"
            found = {label: tuple(float(p.value) for p in points) for label, points in series_of(panel).items()}
            assert found == {"all": all_of_it, "web": web}
