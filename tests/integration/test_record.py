"""The record of a run is written past every refusal, and tells of each stage what it was trained with."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_toys import small_recipe

from sft.recipe import Recipe, RunPaths
from sft.run.chain import run, train
from sft.utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of a run whose first stage is done."""
    root = tmp_path_factory.mktemp("record")
    train(small_recipe(root), only_stage="a")
    return root


@pytest.fixture
def recipe(root: Path) -> Recipe:
    return small_recipe(root)


def record(recipe: Recipe) -> dict[str, bytes]:
    """All small files at the top of the run's folder, and of its stages."""
    top = RunPaths(recipe).root
    found = [path for path in (*top.glob("*"), *top.glob("stages/*/*")) if path.is_file()]
    return {str(path): path.read_bytes() for path in found if path.suffix in (".json", ".yaml")}


def changed(recipe: Recipe, **train_keys: Any) -> Recipe:
    other = recipe.model_copy(deep=True)
    for key, value in train_keys.items():
        setattr(other.stages[0].train, key, value)
    return other


def test_a_refused_run_leaves_the_record(recipe: Recipe) -> None:
    before = record(recipe)
    with pytest.raises(UserError, match=r"Stage a is done, but with other settings: train\.learning_rate"):
        run(changed(recipe, learning_rate=0.25))
    assert record(recipe) == before


def test_one_stage_alone_doesnt_rename_what_another_was_trained_with(recipe: Recipe) -> None:
    before = record(recipe)
    with pytest.raises(UserError, match=r"Stage a is done, but with other settings: train\.learning_rate"):
        train(changed(recipe, learning_rate=0.25), only_stage="b")
    assert record(recipe) == before


def test_a_busy_folder_keeps_its_record(recipe: Recipe) -> None:
    before = record(recipe)
    other = recipe.model_copy(deep=True)
    other.stages[1].train.learning_rate = 0.5
    with open(RunPaths(recipe).root / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="Another run is at work"):
            run(other)
    assert record(recipe) == before


def test_settings_without_effect_on_weights_are_told_as_trained(recipe: Recipe) -> None:
    """Another logging_steps is no other training; the record goes on telling the one that was used."""
    train(changed(recipe, logging_steps=7), only_stage="a")
    resolved = yaml.safe_load(RunPaths(recipe).resolved.read_text())
    assert resolved["stages"][0]["train"].get("logging_steps") != 7


def test_the_record_says_what_ran(recipe: Recipe) -> None:
    paths = RunPaths(recipe)
    manifest = json.loads(paths.manifest.read_text())
    assert list(manifest["stages"]) == ["a"] and manifest["stages"]["a"]["steps"] == 3
    assert manifest["environment"]["packages"]["torch"]
    trained = json.loads(paths.stage_manifest("a").read_text())
    assert trained["recipe"]["train"]["learning_rate"] == 2e-3
    assert manifest["stages"]["a"]["files"] == trained["files"] != {}


def test_a_file_system_without_locks_is_told_and_not_taken_for_another_run(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_locks(*arguments: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("sft.run.lock.fcntl.flock", no_locks)
    train(recipe, only_stage="a")
    assert "no locks on this file system (Function not implemented)" in capsys.readouterr().err
