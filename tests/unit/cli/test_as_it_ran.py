"""What looks at a run that is there takes what its command line set from its record: it needn't be typed again."""

from __future__ import annotations

from pathlib import Path

import pytest

from sft.cli.main import main
from sft.recipe import RunPaths, load_recipe
from sft.run.record import overrides_as_run, write_record

RECIPE = """\
name: mine
output_dir: OUT
model: {tokenizer: tiny, config: {}}
stages:
  - name: one
    data: {sources: [{path: "${data}"}]}
"""
GIVEN = ["--variables.data", "here.jsonl", "--stages.one.train.learning_rate=0.5"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe that can't be loaded without its variable, whose run has left its record."""
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE.replace("OUT", str(tmp_path / "run")))
    write_record(RunPaths(load_recipe(path, GIVEN)))
    (tmp_path / "run" / "stages").mkdir()
    return path


def test_a_report_says_what_ran(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recipe)]) == 0
    assert "as it ran: --variables.data --stages.one.train.learning_rate as then" in capsys.readouterr().err
    page = (recipe.parent / "run" / "report" / "index.html").read_text()
    assert "here.jsonl" in page and "learning_rate: 0.5" in page


@pytest.mark.parametrize(
    "verb", [["chat", "--prompt", "x"], ["serve", "--port", "0"], ["export"], ["push", "--repo_id", "a/b"]]
)
def test_other_verbs_that_look_at_a_run(recipe: Path, verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb[0], str(recipe), *verb[1:]]) == 1
    assert "no stage of mine is trained" in capsys.readouterr().err


def test_what_is_typed_now_wins(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(recipe), "--variables.data", "there.jsonl"]) == 0
    assert "as it ran: --stages.one.train.learning_rate as then" in capsys.readouterr().err
    page = (recipe.parent / "run" / "report" / "index.html").read_text()
    assert "there.jsonl" in page and "learning_rate: 0.5" in page


def test_a_run_in_another_folder_is_found_by_its_folder(recipe: Path, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    write_record(RunPaths(load_recipe(recipe, [*GIVEN, "--seed", "3", "--output_dir", other])))
    assert overrides_as_run(str(recipe), []) == GIVEN
    assert "--seed" in overrides_as_run(str(recipe), ["--output_dir", other])


def test_a_recipe_that_was_edited_since_is_read_as_it_is(recipe: Path) -> None:
    recipe.write_text(recipe.read_text() + "seed: 1\n")
    assert overrides_as_run(str(recipe), []) == []


@pytest.mark.parametrize("words", [["--output_dir", "{}"], ["stray"], ["--variables.data"]])
def test_mistakes_are_told_where_the_recipe_is_loaded(recipe: Path, words: list[str]) -> None:
    assert overrides_as_run(str(recipe), words) == []
    assert overrides_as_run("no-such-recipe", []) == []
    assert main(["report", str(recipe), *words]) == 2
