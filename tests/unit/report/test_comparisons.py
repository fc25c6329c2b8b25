"""The report's section on what each stage changed."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_toys import STAGES, Page, make_recipe, write_stage, write_suite

from sft.evaluate.paired import compare_samples
from sft.evaluate.sample_files import read_suite
from sft.recipe import Recipe, RunPaths
from sft.report import write_report
from sft.report.collect import collect
from sft.report.comparisons import HEAD, step_rows, steps_of


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A whole run; its figures aren't drawn."""
    monkeypatch.setattr("sft.report.page.draw_all", lambda run: {})
    recipe = make_recipe(tmp_path / "run")
    paths = RunPaths(recipe)
    write_suite(paths, "start")
    for name in STAGES:
        write_stage(paths, name)
        write_suite(paths, name)
    # Another model's results are no part of the run's way.
    write_suite(paths, "model-other")
    return recipe


def test_each_stage_stands_against_the_one_before(recipe: Recipe) -> None:
    found = steps_of(collect(recipe, RunPaths(recipe)))
    assert not any("changed after" in note for note in found.notes)
    assert [(step.before, step.after) for step in found.steps] == [
        ("start", "broad"),
        ("broad", "hard"),
        ("hard", "long"),
        ("start", "long"),
    ]
    folders = [RunPaths(recipe).eval_dir(point, "held-out") for point in ("broad", "hard")]
    before, after = (read_suite(folder / "samples.jsonl", "held-out") for folder in folders)
    alone = compare_samples(before, after)
    assert found.steps[1].found == alone and alone.problems == 200
    row = dict(zip(HEAD, step_rows(found)[1], strict=True))
    assert row["gain"] == f"{100 * alone.pass_at_1.value:+.1f}" and row["gained"] == str(len(alone.gained))


def test_the_page_shows_it_with_what_changed_sides(recipe: Recipe) -> None:
    folder = write_report(recipe, RunPaths(recipe)).parent
    page = Page((folder / "index.html").read_text(encoding="utf-8"))
    assert page.open == [] and "What each stage changed" in page.text
    assert "held-out, start to broad: problems that changed sides (" in page.text
    assert "Right is 1; A says 2, B 1" in page.text and "Undecided answers count as not right" in page.text
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| held-out | ")]
    assert len(rows) == 4


def test_samples_that_cant_be_read_are_named(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    (paths.eval_dir("hard", "held-out") / "samples.jsonl").unlink()
    lines = paths.eval_dir("long", "held-out") / "samples.jsonl"
    lines.write_text("".join(lines.read_text().splitlines(keepends=True)[:-7]))
    found = steps_of(collect(recipe, paths))
    assert [(step.before, step.after) for step in found.steps] == [
        ("start", "broad"),
        ("broad", "long"),
        ("start", "long"),
    ]
    assert found.notes[0].startswith("held-out at hard is left out: ") and "can't be read" in found.notes[0]
    assert any("was changed after it was scored" in note for note in found.notes)
    assert found.steps[-1].found.only == (7, 0)


def test_a_run_with_one_point_has_no_such_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sft.report.page.draw_all", lambda run: {})
    recipe = make_recipe(tmp_path / "run")
    write_suite(RunPaths(recipe), "start")
    page = write_report(recipe, RunPaths(recipe))
    assert "What each stage changed" not in page.read_text(encoding="utf-8")
