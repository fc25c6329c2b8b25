"""What a stage of a run hands on can be changed without training again, is evaluated, and is told in the manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from run_toys import small_recipe
from safetensors.torch import load_file

from sft.run.chain import run, train
from sft.run.outlook import outlook
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError
from sft.utils.hashes import folder_hashes

KEPT = {"save_steps": 1, "save_total_limit": 3}


def handed_on(root: Path) -> dict[str, torch.Tensor]:
    (path,) = (root / "run/stages/a/final").glob("*model.safetensors")
    return load_file(path)


def checkpoint(root: Path, step: int) -> dict[str, torch.Tensor]:
    (path,) = (root / f"run/stages/a/checkpoint-{step}").glob("*model.safetensors")
    return load_file(path)


def test_another_average_of_a_stage_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = small_recipe(tmp_path, stages=(KEPT,), first={"average": {"last": 2}})
    assert "   hands on an average: the last 2 checkpoints" in list(outlook(recipe))
    run(recipe)
    record = json.loads((tmp_path / "run/manifest.json").read_text())["stages"]["a"]
    assert [parent["name"] for parent in record["average"]] == ["checkpoint-2", "checkpoint-3"]
    for parent in record["average"]:
        folder = tmp_path / f"run/stages/a/{parent['name']}"
        assert parent["files"] == folder_hashes(folder, ("model.safetensors",))
    second, third = checkpoint(tmp_path, 2), checkpoint(tmp_path, 3)
    found = handed_on(tmp_path)
    assert all(torch.equal(found[n], ((second[n].double() + third[n].double()) / 2).float()) for n in third)

    monkeypatch.setattr(SambayTrainer, "training_step", None)
    other = run(small_recipe(tmp_path, stages=(KEPT,)))
    assert all(torch.equal(tensor, third[name]) for name, tensor in handed_on(tmp_path).items())
    assert other["stages"]["a"]["steps"] == 3
    told = capsys.readouterr().err
    assert "start: evaluated already" in told and "a: evaluated already" not in told
    again = {"average": {"with": "start", "weight": 0.5}}
    assert train(small_recipe(tmp_path, stages=(KEPT,), first=again))["stages"]["a"]["average"][1]["name"] == "start"
    start, mixed = load_file(tmp_path / "start/model.safetensors"), handed_on(tmp_path)
    assert all(torch.equal(mixed[n], (0.5 * third[n].double() + 0.5 * start[n].double()).float()) for n in third)


def test_not_where_another_stage_stands_on_it_or_its_checkpoints_are_gone(tmp_path: Path) -> None:
    train(small_recipe(tmp_path, stages=(KEPT, {})))
    changed = small_recipe(tmp_path, stages=(KEPT, {}), first={"average": {"last": 2}})
    with pytest.raises(UserError, match=r"Stage a is done, .*stage b was trained from what it handed on"):
        train(changed)
    (tmp_path / "run/stages/b/manifest.json").unlink()
    (tmp_path / "run/stages/a/checkpoint-3/complete.json").unlink()
    with pytest.raises(UserError, match=r"Stage a is done, .*checkpoint-3, to make it from, is gone or damaged"):
        train(changed)


@pytest.mark.parametrize("adapter", [False, True], ids=["all weights", "adapter"])
def test_the_best_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapter: bool) -> None:
    """Of those that save_total_limit keeps; and another suite's limit is no other training."""
    from sft.evaluate import runner

    asked: list[str] = []
    reached = {"checkpoint-1": 1.0, "checkpoint-2": 0.5, "checkpoint-3": 0.25}

    def evaluate(model: Any, tokenizer: Any, section: Any, *, point: str, **more: Any) -> Any:
        asked.append(point)
        assert not model.training and [suite.name for suite in section.suites] == ["sums"]
        return {"sums": {"pass_at_1": reached.get(point, 0.0)}}

    monkeypatch.setattr(runner, "evaluate", evaluate)
    keys = {**KEPT, "save_total_limit": 2, **({"use_peft": True, "lora_r": 2} if adapter else {})}
    recipe = small_recipe(tmp_path, stages=(keys,), first={"keep_best": "sums"})
    manifest = train(recipe)["stages"]["a"]
    assert asked == ["checkpoint-2", "checkpoint-3"]
    assert manifest["best"] == {"step": 2, "scores": {"checkpoint-2": 0.5, "checkpoint-3": 0.25}}
    wanted = checkpoint(tmp_path, 2)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in handed_on(tmp_path).items())
    assert not list((tmp_path / "run/stages/a").glob(".candidate*"))


def test_the_best_by_a_real_suite_is_the_earliest_of_equals(tmp_path: Path) -> None:
    """Random weights answer nothing."""
    recipe = small_recipe(tmp_path, stages=(KEPT,), first={"keep_best": "sums.pass_at_1"})
    manifest = train(recipe)["stages"]["a"]
    assert manifest["best"] == {"step": 1, "scores": {f"checkpoint-{step}": 0.0 for step in (1, 2, 3)}}
    assert (tmp_path / "run/stages/a/compared/checkpoint-2/sums/metrics.json").is_file()
