"""Stages one after the other, from data files: adapters handed on, merged, full weights; what is done is skipped."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import read_metrics, saved_weights

from sft.recipe.paths import RunPaths
from sft.recipe.schema import Recipe
from sft.run.chain import run, train
from sft.run.library import run as run_library
from sft.run.outlook import outlook
from sft.train.collator import PackedCollator
from sft.train.handover import load_stage_model
from sft.train.interrupt import Interrupted
from sft.train.probe import accepted_inputs
from sft.utils.errors import RestartError, UserError

MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}


def write_rows(path: Path, rows: int) -> Path:
    lines = [{"question": f"What is {i} + {i + 1}?", "answer": f"It is {2 * i + 1}."} for i in range(rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def chain(root: Path, *trains: dict[str, Any], **overrides: Any) -> Recipe:
    data = write_rows(root / "rows.jsonl", 24)
    source = {"path": str(data), "columns": {"prompt": "question", "completion": "answer"}}
    base = {"max_steps": 4, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "max_length": 96}
    return Recipe.model_validate(
        {
            "name": "chain",
            "output_dir": str(root / "run"),
            "model": {"config": MODEL, "tokenizer": "tiny"},
            "stages": [
                {"name": f"s{index}", "data": {"sources": [source]}, "train": {**base, **train}}
                for index, train in enumerate(trains)
            ],
            **overrides,
        }
    )


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(5, 25)[None], use_cache=False).logits


@pytest.fixture(scope="module")
def chained(tmp_path_factory) -> RunPaths:
    """LoRA, the same LoRA again (packed), another LoRA, all weights."""
    root = tmp_path_factory.mktemp("chain")
    whole = {"per_device_train_batch_size": 24}
    trains = [LORA, {**LORA, "packing": True}, {**LORA, "lora_r": 2, "use_dora": True}, {}]
    recipe = chain(root, *[{**whole, **train} for train in trains])
    result = run(recipe)
    assert list(result["stages"]) == ["s0", "s1", "s2", "s3"]
    assert result["evaluations"] == {f"s{i}": {} for i in range(4)} | {"start": {}}
    return RunPaths(recipe)


def test_every_stage_starts_where_the_one_before_ended(chained):
    """A stage's first loss, over all rows in one batch, is that of the model that was handed on."""
    from peft import PeftModel

    from sft.data.prepare import prepare_stage

    points = [None, "s0", "s1", "s2", "s3"]
    for before, stage in zip(points, chained.recipe.stages, strict=False):
        model, tokenizer = load_stage_model(chained, before)
        batch = PackedCollator()(list(prepare_stage(chained.recipe, stage, tokenizer).dataset))
        with torch.no_grad():
            loss = model.eval()(**accepted_inputs(model, batch)).loss.item()
        losses = [line["loss"] for line in read_metrics(chained.metrics(stage.name))]
        assert losses[0] == pytest.approx(loss, abs=2e-6)
        assert len(losses) == 4 and losses[-1] < losses[0]
        assert isinstance(load_stage_model(chained, stage.name)[0], PeftModel) == (stage.name != "s3")


def test_equal_settings_go_on_with_the_same_adapter(chained):
    base = [json.loads((chained.final_dir(name) / "base.json").read_text()) for name in ("s0", "s1")]
    assert base[0] == base[1] and base[0]["kind"] == "start"
    first, second = (saved_weights(chained.final_dir(name)) for name in ("s0", "s1"))
    assert first.keys() == second.keys()
    assert any(not torch.equal(first[name], second[name]) for name in first)
    assert not (chained.stage_dir("s1") / "base").exists()


def test_other_settings_merge_first(chained):
    """The base written for the third stage is the second stage's model, merged."""
    from sft.models.load import load_checkpoint

    base = json.loads((chained.final_dir("s2") / "base.json").read_text())
    assert base["path"] == "stages/s2/base"
    merged = load_checkpoint(str(chained.root / base["path"]), dtype="float32")
    second, _ = load_stage_model(chained, "s1")
    torch.testing.assert_close(logits(merged), logits(second), rtol=1e-4, atol=1e-5)


def test_all_weights_after_lora_are_a_plain_model(chained):
    final = chained.final_dir("s3")
    assert not (final / "base.json").exists() and not (final / "adapter_config.json").exists()
    assert not any("lora" in name for name in saved_weights(final))


def test_finished_stages_are_skipped(chained, monkeypatch, capsys):
    monkeypatch.setattr("sft.run.chain.train_stage", lambda *args, **kwargs: pytest.fail("trained again"))
    result = train(chained.recipe)
    assert [manifest["steps"] for manifest in result["stages"].values()] == [4, 4, 4, 4]
    assert capsys.readouterr().err.count("done already (4 steps), skipped") == 4


def test_a_changed_recipe_is_refused_and_nothing_is_touched(chained):
    changed = chained.recipe.model_copy(deep=True)
    changed.stages[1].train.learning_rate = 0.5
    before = saved_weights(chained.final_dir("s1"))
    with pytest.raises(UserError, match=r"Stage s1 is done, but with other settings: train\.learning_rate was 0\.002"):
        train(changed)
    after = saved_weights(chained.final_dir("s1"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_whose_base_was_swapped_is_refused(tmp_path):
    recipe = chain(tmp_path, LORA)
    train(recipe)
    other = recipe.model_copy(deep=True)
    other.seed = recipe.seed + 1
    with pytest.raises(UserError, match="no longer the one its adapter was trained on"):
        load_stage_model(RunPaths(other), "s0")


def test_restart_does_a_stage_and_the_later_ones_again(tmp_path):
    recipe = chain(tmp_path, {}, {}, {})
    first = train(recipe)["stages"]
    changed = recipe.model_copy(deep=True)
    changed.stages[1].train.learning_rate = 1e-3
    second = train(changed, restart="s1")["stages"]
    assert second["s0"]["key"] == first["s0"]["key"]
    assert all(second[name]["key"] != first[name]["key"] for name in ("s1", "s2"))


def test_a_restart_that_was_stopped_goes_on_by_the_same_command(tmp_path, monkeypatch, capsys):
    """It throws away once: what was made since stays, until all is done, or something else is asked for."""
    recipe = chain(tmp_path, {}, {"max_steps": 8, "save_steps": 2, "save_total_limit": 5}, {})
    train(recipe)
    paths, words = RunPaths(recipe), {"only_stage": None, "restart": "s1"}
    straight = saved_weights(paths.final_dir("s2"))
    stopped_at(monkeypatch, 2)
    for steps in (2, 4):
        with pytest.raises(Interrupted):
            train(recipe, **words)
        assert (paths.stage_dir("s1") / f"checkpoint-{steps}").is_dir()
    monkeypatch.undo()
    assert any("2. s1: under way, saved at step 4" in line for line in outlook(recipe, restart="s1"))
    capsys.readouterr()
    assert list(run_library(recipe, restart="s1", evaluate=False)["stages"]) == ["s0", "s1", "s2"]
    assert "threw away" not in capsys.readouterr().err and not paths.restart.exists()
    assert all(torch.equal(weight, straight[name]) for name, weight in saved_weights(paths.final_dir("s2")).items())
    train(recipe, **words)
    assert "threw away s1, s2" in capsys.readouterr().err


def test_a_restart_of_another_recipe_or_past_an_error_that_asks_for_it_begins_anew(tmp_path, monkeypatch, capsys):
    recipe = chain(tmp_path, {"save_steps": 2})
    stopped_at(monkeypatch, 2)
    changed = recipe.model_copy(deep=True)
    changed.stages[0].train.learning_rate = 1e-3
    for asked in (recipe, changed):
        with pytest.raises(Interrupted):
            train(asked, restart="s0")
        assert capsys.readouterr().err.count("threw away s0") == 1
    monkeypatch.undo()
    with pytest.raises(RestartError, match="--restart s0"):
        train(recipe)
    assert not RunPaths(recipe).restart.exists()
    train(changed, restart="s0")
    assert "threw away s0" in capsys.readouterr().err


def stopped_at(monkeypatch, steps: int) -> None:
    """Every stage is told to stop after so many steps of a call."""
    from sft.train.trainer import SambayTrainer

    original, done = SambayTrainer.training_step, []

    def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        done.append(trainer)
        if done.count(trainer) == steps:
            signal.raise_signal(signal.SIGTERM)
        return original(trainer, *args, **kwargs)

    monkeypatch.setattr(SambayTrainer, "training_step", training_step)


def test_one_stage_needs_those_before_it(tmp_path):
    recipe = chain(tmp_path, {}, {})
    with pytest.raises(UserError, match="Stage s1 starts from stage s0, which isn't done: train that first"):
        train(recipe, only_stage="s1")
    with pytest.raises(UserError, match=r"Stage s0 isn't done"):
        load_stage_model(RunPaths(recipe), "s0")
    assert list(train(recipe, only_stage="s0")["stages"]) == ["s0"]
    assert list(train(recipe, only_stage="s1")["stages"]) == ["s1"]


def test_two_runs_in_one_folder_are_refused(tmp_path):
    import fcntl

    recipe = chain(tmp_path, {})
    paths = RunPaths(recipe)
    paths.root.mkdir(parents=True)
    with open(paths.root / ".lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(UserError, match="Another run is at work"):
            train(recipe)


@pytest.mark.parametrize("damage", ["manifest", "final"])
def test_damaged_stages_say_what_to_do(tmp_path, damage):
    import shutil

    recipe = chain(tmp_path, {"max_steps": 1})
    train(recipe)
    paths = RunPaths(recipe)
    if damage == "manifest":
        paths.stage_manifest("s0").write_text('{"key": ')
    else:
        shutil.rmtree(paths.final_dir("s0"))
    with pytest.raises(UserError, match="--restart s0"):
        train(recipe)
