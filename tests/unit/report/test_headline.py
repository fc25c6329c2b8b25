"""One line of verdict, and the facts at the top: true to what lies in the run's folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_toys import STAGES, Page, make_recipe, write, write_stage

from sft.recipe import Recipe, RunPaths, load_recipe
from sft.report import write_report
from sft.report.collect import collect
from sft.report.headline import command, facts, verdict
from sft.utils.files import read_sealed, write_sealed


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return make_recipe(tmp_path / "run")


def said(recipe: Recipe) -> str:
    return verdict(collect(recipe, RunPaths(recipe)))


def set_result(recipe: Recipe, point: str, value: float, low: float, high: float, suite: str = "held-out") -> None:
    path = RunPaths(recipe).eval_dir(point, suite) / "metrics.json"
    known = read_sealed(path) or {}
    write(path, {**known, "pass_at_1": value, "interval": [low, high], "problems": 9, "verdicts": {}, "tokens": {}})


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        ((0.1, 0.05, 0.2), (0.9, 0.8, 0.95), "held-out rose from 10.0% to 90.0% right"),
        ((0.9, 0.8, 0.95), (0.1, 0.05, 0.2), "held-out fell from 90.0% to 10.0% right"),
        ((0.1, 0.05, 0.2), (0.2, 0.15, 0.3), "held-out 10.0% to 20.0% right, within the 95% intervals"),
        ((0.1, 0.05, 0.2), (0.1, 0.05, 0.2), "held-out stayed at 10.0% right"),
    ],
)
def test_a_change_counts_beyond_the_intervals(recipe: Recipe, first: Any, last: Any, text: str) -> None:
    for name in STAGES:
        write_stage(RunPaths(recipe), name)
    set_result(recipe, "start", *first)
    set_result(recipe, "long", *last)
    assert said(recipe) == f"3 of 3 stages trained: {text}."


def test_what_is_not_done_is_said(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    assert said(recipe) == "0 of 3 stages trained yet: nothing is evaluated yet."
    set_result(recipe, "start", 0.5, 0.4, 0.6)
    assert said(recipe) == "0 of 3 stages trained yet: held-out 50.0% right at the start."
    write_stage(paths, "broad", done=False)
    assert said(recipe).startswith("0 of 3 stages trained yet, one under way: ")
    write_stage(paths, "broad")
    assert said(recipe) == "1 of 3 stages trained: held-out 50.0% right at the start."


def test_without_suites_the_loss_is_told(recipe: Recipe) -> None:
    bare = make_recipe(Path(recipe.output_dir))
    for stage in bare.stages:
        stage.evaluate.suites.clear()
    write_stage(RunPaths(bare), "broad")
    assert re.fullmatch(r"1 of 3 stages trained: loss [\d.]+ to [\d.]+ in broad; no suite was asked for\.", said(bare))
    assert "No suite was asked for" in Page(write_report(bare, RunPaths(bare)).read_text()).text


def test_many_suites_are_counted_and_other_models_left_out(recipe: Recipe) -> None:
    write_stage(RunPaths(recipe), "broad")
    for suite in ("held-out", "a", "b", "c"):
        set_result(recipe, "broad", 0.5, 0.4, 0.6, suite)
        set_result(recipe, "model-peer", 0.9, 0.8, 1.0, suite)
    text = said(recipe)
    assert text.endswith("; 2 more suites below.") and text.count("50.0% right after broad") == 2 and "90" not in text


def test_the_facts_at_the_top(tmp_path: Path) -> None:
    file = tmp_path / "my recipe.yaml"
    file.write_text(
        f"name: demo\noutput_dir: {tmp_path / 'run'}\n"
        "model: {model_name_or_path: some-org/base, model_revision: v2}\n"
        "stages: [{name: broad, data: {sources: [{path: x.jsonl}]}}]\n"
    )
    recipe = load_recipe(file, ["--seed", "7"])
    paths = RunPaths(recipe)
    told = dict(facts(collect(recipe, paths), paths))
    assert told == {"base model": "some-org/base (revision v2)", "command": told["command"]}
    write_stage(paths, "broad")
    # What ran is what the record says, whatever `sft report` was called with.
    write_sealed(paths.manifest, {"overrides": ["--seed", "8", "--name", "a b", "--push.token", "swordfish"]})
    run = collect(recipe, paths)
    told = dict(facts(run, paths))
    assert set(told) == {"base model", "finished", "machine", "command"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", told["finished"]) and told["machine"].startswith("cpu")
    assert command(run, paths).splitlines()[0] == f"sft run '{file}' \\"
    assert [line.strip(" \\") for line in command(run, paths).splitlines()[1:]] == [
        "--seed 8", "--name 'a b'", "--push.token REDACTED"
    ]  # fmt: skip
    page = Page(write_report(recipe, paths).read_text())
    markdown = (paths.report / "report.md").read_text()
    for text in (page.text, markdown):
        assert verdict(run) in text and "some-org/base" in text and told["finished"] in text
        assert "swordfish" not in text and str(tmp_path) not in text and "my recipe.yaml" in text
    assert page.text.index(verdict(run)) < page.text.index("Results")


def test_a_run_from_random_weights_has_no_base_model(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    assert dict(facts(collect(recipe, paths), paths))["base model"].startswith("none: random weights")
