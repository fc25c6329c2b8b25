"""What a stage runs on, without a launcher: settings, refusals, one process under DeepSpeed, one GPU of several."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from train_toys import saved_weights, tiny_sambay, toy_recipe, toy_rows, train_toy

from sft.recipe.packaged import find_deepspeed
from sft.recipe.paths import RunPaths
from sft.train.arguments import build_arguments, check_arguments
from sft.train.engine import check_engine, deepspeed_settings, fresh_engine
from sft.utils.errors import UsageError, UserError

# Without clipping, whose factor each engine rounds in its own way.
TRAIN = {"packing": True, "max_steps": 2, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0}
TRAIN |= {"per_device_train_batch_size": 2}


def settings(asked: Any, *, bf16: bool = True) -> dict[str, Any]:
    found = deepspeed_settings(asked, bf16=bf16, where="stages[s].train")
    assert found is not None
    return found


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a plain shell."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_") or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"):
            monkeypatch.delenv(name)


# ---- settings ----


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("bf16", [True, False])
def test_weights_and_sums_are_float32_under_every_packaged_configuration(name, bf16):
    found = settings(str(find_deepspeed(name)), bf16=bf16)
    assert "bf16" not in found and "fp16" not in found
    autocast = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    assert found["torch_autocast"] == autocast
    assert found["data_types"]["grad_accum_dtype"] == "fp32"
    assert found["zero_optimization"]["stage"] == int(name[-1])
    assert found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_a_recipe_s_own_settings_stay_as_they_are():
    asked = {
        "zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False},
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "wall_clock_breakdown": True,
    }
    before = json.dumps(asked)
    found = settings(asked)
    assert json.dumps(asked) == before
    assert found["wall_clock_breakdown"] is True and found["data_types"] == {"grad_accum_dtype": "fp32"}
    assert found["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


@pytest.mark.parametrize(
    "extra, bf16, told",
    [
        ({"optimizer": {"type": "AdamW"}}, True, "`optimizer` has no place there"),
        ({"scheduler": {"type": "WarmupLR"}}, True, "`scheduler` has no place there"),
        ({"amp": {"enabled": True}}, True, "`amp` has no place there"),
        ({"fp16": {"enabled": True}}, False, "fp16 isn't supported"),
        ({"bf16": {"enabled": True}}, False, "bf16.enabled is True, but the stage's bf16 is False"),
        ({"bf16": {"enabled": False}}, True, "bf16.enabled is False, but the stage's bf16 is True"),
    ],
)
def test_settings_that_contradict_the_stage_are_refused(extra, bf16, told):
    with pytest.raises(UsageError, match=r"stages\[s\].train.deepspeed: ") as refused:
        settings({"zero_optimization": {"stage": 2}, **extra}, bf16=bf16)
    assert told in str(refused.value)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_a_file_that_holds_no_settings_is_named(tmp_path, text):
    file = tmp_path / "ds.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"ds\.json"):
        settings(str(file))


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG"),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "fp16"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "fp8"),
    ],
)
def test_a_launcher_s_wish_that_isn_t_run_is_refused_at_the_start(
    no_launcher, monkeypatch, tmp_path, name, value, told
):
    monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=told):
        check_arguments(toy_recipe(tmp_path, TRAIN).stages[0])


def test_what_the_engine_can_t_do_is_refused_at_the_start(no_launcher, tmp_path):
    train = {**TRAIN, "deepspeed": "zero3", "use_peft": True, "gradient_checkpointing": True}
    with pytest.raises(UsageError, match="LoRA with ZeRO-3 and gradient checkpointing"):
        check_arguments(toy_recipe(tmp_path, train).stages[0])
    with pytest.raises(UsageError, match="`optimizer` has no place there"):
        check_arguments(toy_recipe(tmp_path, {**TRAIN, "deepspeed": {"optimizer": {}}}).stages[0])


# ---- one process ----


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    root = tmp_path_factory.mktemp("without")
    _, paths = train_toy(root, {**TRAIN, "bf16": True}, model=tiny_sambay(), prepared=toy_rows(8, packed=True))
    return saved_weights(paths.final_dir("one"))


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero1"])
def test_deepspeed_needs_no_launcher_and_changes_no_bit(no_launcher, without, tmp_path, name):
    """One engine after the other in this process; nothing of them stays."""
    before = dict(os.environ)
    train = {**TRAIN, "bf16": True, "deepspeed": name}
    manifest, paths = train_toy(tmp_path, train, model=tiny_sambay(), prepared=toy_rows(8, packed=True))
    assert (manifest["engine"], manifest["zero_stage"]) == ("DeepSpeedEngine", int(name[-1]))
    assert (manifest["world_size"], manifest["precision"]) == (1, "bfloat16")
    weights = saved_weights(paths.final_dir("one"))
    assert weights.keys() == without.keys()
    assert all(torch.equal(weights[key], without[key]) for key in without)
    assert dict(os.environ) == before and not torch.distributed.is_initialized()


def test_an_engine_is_ended_when_its_stage_fails(no_launcher, tmp_path, monkeypatch):
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    before = dict(os.environ)
    monkeypatch.setattr("sft.train.job.save_final", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_toy(tmp_path, {**TRAIN, "deepspeed": "zero3"}, model=tiny_sambay(), prepared=toy_rows(8, packed=True))
    assert dict(os.environ) == before and not torch.distributed.is_initialized()
    assert not is_deepspeed_zero3_enabled()


def test_one_process_uses_one_gpu_of_several(no_launcher, tmp_path, monkeypatch):
    """transformers would split every batch over them by rows."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name in ("set_device", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    recipe = toy_recipe(tmp_path, {**TRAIN, "use_cpu": False, "bf16": False})
    with fresh_engine():
        args = build_arguments(recipe.stages[0], RunPaths(recipe), bf16=False)
        assert (args.device, args.n_gpu, args.world_size) == (torch.device("cuda:0"), 1, 1)
        assert args.train_batch_size == TRAIN["per_device_train_batch_size"]


def test_transformers_asks_flash_attention_for_the_same_bits_while_a_stage_trains(no_launcher, tmp_path, monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    recipe = toy_recipe(tmp_path, TRAIN)
    with fresh_engine():
        build_arguments(recipe.stages[0], RunPaths(recipe), bf16=False)
        assert os.environ["FLASH_ATTENTION_DETERMINISTIC"] == "1"
    assert "FLASH_ATTENTION_DETERMINISTIC" not in os.environ


# ---- asked and running ----


def pretended(wrapper: str, **asked: Any) -> Any:
    """A trainer whose model is wrapped in something called `wrapper`."""
    args = {"deepspeed": None, "bf16": False, **asked}
    wrapped = type(wrapper, (), {})()
    accelerator = SimpleNamespace(mixed_precision="no", num_processes=1)
    held = {"model": object(), "model_wrapped": wrapped, "sequence_parallel_size": 1, "row_ranks": None}
    return SimpleNamespace(args=SimpleNamespace(**args), accelerator=accelerator, **held)


@pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel", "FullyShardedDataParallel"])
def test_an_engine_that_nobody_asked_for_stops_the_stage(no_launcher, wrapper):
    with pytest.raises(UserError, match=f"engine {wrapper} in place of None"):
        check_engine(pretended(wrapper))


def test_a_precision_that_nobody_asked_for_stops_the_stage(no_launcher):
    trainer = pretended("Model", bf16=True)
    trainer.model = trainer.model_wrapped
    with pytest.raises(UserError, match="precision float32 in place of bfloat16"):
        check_engine(trainer)


def test_every_training_asks_what_it_runs_on(no_launcher, tmp_path, monkeypatch):
    monkeypatch.setattr("sft.train.engine.world_size", lambda: 2)
    # Which would look for the other one.
    monkeypatch.setattr("sft.train.arguments.start_engine", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="world_size 1 in place of 2"):
        train_toy(tmp_path, TRAIN, model=tiny_sambay(), prepared=toy_rows(8, packed=True))
    assert not Path(tmp_path / "stages/one/final").exists()
