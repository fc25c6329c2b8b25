"""The report of whole, partial and damaged runs."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_toys import STAGES, Page, make_recipe, write, write_stage, write_suite

from sft.evaluate.runner import read_samples, sample_line
from sft.recipe import Recipe, RunPaths
from sft.report import write_report
from sft.report.collect import collect
from sft.report.figures import draw_accuracy
from sft.report.page import _summary, unique_ids
from sft.report.tables import count, data_rows, duration, result_rows, training_rows
from sft.utils.files import read_sealed


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of a report's time; whole and partial runs draw, the other tests don't look at figures."""
    monkeypatch.setattr("sft.report.page.draw_all", lambda run: {})


def report(recipe: Recipe) -> tuple[Page, Path]:
    path = write_report(recipe, RunPaths(recipe))
    return Page(path.read_text(encoding="utf-8")), path


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path / "run")


@pytest.fixture
def whole(recipe: Recipe) -> Recipe:
    paths = RunPaths(recipe)
    write_suite(paths, "start")
    for name in STAGES:
        write_stage(paths, name)
        write_suite(paths, name)
    return recipe


def check_markdown(folder: Path, whole: Recipe) -> None:
    """The Markdown tells the same results, in whole tables, with the pictures that are beside it."""
    text = (folder / "report.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| **held-out**")]
    expected = result_rows(collect(whole, RunPaths(whole)))[0]
    assert len(rows) == 1 and all(cell.value in rows[0] for cell in expected.cells)
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == 2 + 3 + 2 + 4 + 2 + 4 + 2 + 3 + 2 + 3
    for line in text.splitlines():
        if line.startswith("![") and line.endswith(".png)"):
            assert (folder / line[line.rindex("(") + 1 : -1]).is_file()


def test_a_whole_run_is_one_page_that_loads_nothing(whole: Recipe) -> None:
    page, path = report(whole)
    assert page.open == [] and page.loaded == []
    assert len(page.ids) == len(set(page.ids))
    assert path == RunPaths(whole).report / "index.html"
    assert "not complete" not in page.text and "A <small> run." in page.text
    # Two figures of results, of lengths, of training twice, each as a picture beside the page too.
    assert {figure.name for figure in (path.parent / "figures").iterdir()} == {
        f"{name}.png" for name in ("accuracy", "steps", "lengths", "loss", "throughput")
    }
    changed, _, samples = page.text.partition("\nSamples\n")
    # The first problem's completion, once as a sample, and before and after each change of sides.
    assert samples.count("characters left out") == 1 and changed.count("characters left out") % 2 == 0
    for word in ("over_length", "2 bad (2 json)", "245,760", "cut off", "greedy", "1 min 03 s", "output_dir"):
        assert word in page.text, word
    check_markdown(path.parent, whole)


def test_gains_are_those_between_points(whole: Recipe) -> None:
    run = collect(whole, RunPaths(whole))
    rows = {(row.suite, row.group): row for row in result_rows(run)}
    assert list(rows) == [("held-out", ""), ("held-out", "arithmetic"), ("held-out", "words")]
    row = rows["held-out", ""]
    values = [float(cell.value.rstrip("%")) for cell in row.cells]
    assert [cell.gain for cell in row.cells[1:]] == pytest.approx([b - a for a, b in pairwise(values)])
    assert row.total_gain == pytest.approx(values[-1] - values[0]) and row.problems == "200"


def test_an_empty_run_says_what_is_missing(recipe: Recipe) -> None:
    page, _ = report(recipe)
    assert "This run is not complete." in page.text and "No evaluation has finished yet." in page.text
    for name in STAGES:
        assert f"Stage {name}: not trained yet." in page.text
    assert "Suite held-out at start: not evaluated yet." in page.text


def test_a_run_under_way_shows_what_there_is(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    write_suite(paths, "start")
    write_stage(paths, "broad")
    write_stage(paths, "hard", done=False, steps=31)
    folder = paths.eval_dir("broad", "held-out")
    folder.mkdir(parents=True)
    (folder / "samples.jsonl").write_text('{"problem": 0}\n{"problem": 1}\n{"prob')
    page, _ = report(recipe)
    assert "Suite held-out at broad: interrupted after 2 answers." in page.text
    assert "Stage hard: interrupted after step 30." in page.text and "Stage long: not trained yet." in page.text
    rows = training_rows(collect(recipe, paths))
    assert [row[:2] for row in rows] == [["broad", "120"], ["hard (not done)", "30"], ["long (not done)", "–"]]


@pytest.mark.usefixtures("no_figures")
def test_broken_files_are_named_and_left_out(whole: Recipe) -> None:
    paths = RunPaths(whole)
    (paths.eval_dir("long", "held-out") / "metrics.json").write_text('{"pass_at_1": 0.')
    paths.stage_manifest("long").write_text("[]")
    page, _ = report(whole)
    assert page.text.count("can't be read and is left out") == 2
    assert "Stage long: interrupted after step 119." in page.text


@pytest.mark.usefixtures("no_figures")
def test_other_evaluated_models_and_suites_join(whole: Recipe) -> None:
    paths = RunPaths(whole)
    write_suite(paths, "model-peer")
    write_suite(paths, "long", "extra")
    run = collect(whole, paths)
    assert run.points == ["start", *STAGES, "model-peer"] and run.suites == ["held-out", "extra"]
    page, _ = report(whole)
    assert "model-peer" in page.text and "extra, pass@1" in page.text


def test_another_model_is_not_the_runs_result(whole: Recipe) -> None:
    """It stands in the table, and neither in a tile nor in the gain nor on the way that the figure draws."""
    paths = RunPaths(whole)
    before = collect(whole, paths)
    tiles, rows = _summary(before), result_rows(before)
    write_suite(paths, "model-peer")
    after = collect(whole, paths)
    assert after.points[-1] == "model-peer" and after.own_points == before.points
    assert _summary(after) == tiles
    for new, old in zip(result_rows(after), rows, strict=True):
        assert new.cells[:-1] == old.cells and new.total_gain == old.total_gain
        assert new.cells[-1].value != old.cells[-1].value and new.cells[-1].gain is None
    figure = draw_accuracy(after)
    assert figure is not None
    assert all(len(np.asarray(line.get_xdata())) < 5 for line in figure.axes[0].lines), "no line joins it to the others"
    page, _ = report(whole)
    assert "after long" in page.text and "after model-peer" not in page.text


@pytest.mark.usefixtures("no_figures")
def test_a_run_without_results_of_its_own_has_no_headline(recipe: Recipe) -> None:
    write_suite(RunPaths(recipe), "model-peer")
    run = collect(recipe, RunPaths(recipe))
    assert not any("pass@1" in label for label, _, _ in _summary(run)) and result_rows(run)[0].total_gain is None
    assert draw_accuracy(run) is not None and report(recipe)[0].text.count("model-peer") == 2


def test_parameters_are_counted_from_the_saved_weights(whole: Recipe) -> None:
    import torch
    from safetensors.torch import save_file

    folder = RunPaths(whole).final_dir("long")
    folder.mkdir(parents=True)
    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, str(folder / "model.safetensors"))
    assert collect(whole, RunPaths(whole)).parameters == 22


def test_what_was_trained_is_told(whole: Recipe) -> None:
    paths = RunPaths(whole)
    for name, lora in (("hard", {"r": 16, "use_dora": False}), ("long", {"r": 8, "use_dora": True})):
        path = paths.stage_manifest(name)
        write(path, {**(read_sealed(path) or {}), "lora": lora})
    trained = [row[-1] for row in training_rows(collect(whole, paths))]
    assert trained == ["all weights", "LoRA adapters of rank 16", "DoRA adapters of rank 8"]


@pytest.mark.parametrize(
    ("parents", "told"),
    [
        ([{"name": "checkpoint-100", "weight": 1.0}], "checkpoint-100"),
        ([{"name": "ema", "weight": 1.0}], "the moving average of its weights"),
        (
            [{"name": "trained", "weight": 0.7}, {"name": "start", "weight": 0.3}],
            "the sum of 0.7 of its last step and 0.3 of its start",
        ),
    ],
)
def test_what_is_handed_on_is_told(whole: Recipe, parents: list[dict[str, Any]], told: str) -> None:
    paths = RunPaths(whole)
    path = paths.stage_manifest("broad")
    manifest = read_sealed(path) or {}
    last = {"name": f"checkpoint-{manifest['steps']}", "weight": 1.0}
    for average, wanted in (([last], "all weights"), (parents, f"all weights; hands on {told}")):
        write(path, {**manifest, "average": average})
        assert training_rows(collect(whole, paths))[0][-1] == wanted


def test_rows_that_are_kept_and_dropped_add_up(whole: Recipe) -> None:
    first = data_rows(collect(whole, RunPaths(whole)))[0]
    assert first[:6] == ["broad", "1,000", "2 bad (2 json); 5 over_length", "–", "0", "993"]


@pytest.mark.usefixtures("no_figures")
def test_text_from_models_cannot_break_the_page(whole: Recipe) -> None:
    paths = RunPaths(whole)
    path = paths.eval_dir("long", "held-out") / "samples.jsonl"
    hostile = "</pre><script>alert(1)</script>\x00 | `|"
    samples = read_samples(path)
    path.write_text("".join(sample_line({**sample, "completion": hostile, "id": hostile}) for sample in samples))
    page, target = report(whole)
    assert "<script" not in target.read_text(encoding="utf-8") and page.open == []


def test_svg_ids_become_unique() -> None:
    svg = '<g id="a"><use xlink:href="#a" style="clip-path: url(#b)"/></g>'
    assert unique_ids(svg, "x") == '<g id="x-a"><use xlink:href="#x-a" style="clip-path: url(#x-b)"/></g>'


def test_numbers_for_reading() -> None:
    assert [duration(s) for s in (None, 5.4, 725, 11_220)] == ["–", "5 s", "12 min 05 s", "3 h 07 min"]
    assert [count(v) for v in (None, 0, 1234567.8)] == ["–", "0", "1,234,568"]
