"""The `train` section against the installed TRL and transformers: same names, same defaults, everything passed on."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from sft.recipe import TrainSection, load_recipe
from sft.recipe.packaged import find_deepspeed, folder, list_data_recipes, list_recipes
from sft.recipe.schema import DataSource
from sft.recipe.train_keys import LORA_KEYS, REFUSED, Scheduler


@pytest.fixture(scope="module")
def fields() -> dict[str, dataclasses.Field[Any]]:
    from trl import ModelConfig, SFTConfig

    lora = {field.name: field for field in dataclasses.fields(ModelConfig) if field.name in LORA_KEYS}
    return lora | {field.name: field for field in dataclasses.fields(SFTConfig)}


def test_declared_keys_are_trls_with_trls_defaults(fields: dict[str, dataclasses.Field[Any]]) -> None:
    for key, declared in TrainSection.model_fields.items():
        assert key in fields, key
        default = getattr(fields[key].default, "value", fields[key].default)
        assert declared.default == default, key


def test_refused_keys_are_not_declared_and_say_why() -> None:
    assert not set(REFUSED) & set(TrainSection.model_fields)
    for key in REFUSED:
        with pytest.raises(ValidationError, match=r"is not for recipes: .+"):
            TrainSection.model_validate({key: True})


def test_schedulers_are_transformers() -> None:
    from transformers.trainer_utils import SchedulerType

    assert set(get_args(Scheduler)) <= {kind.value for kind in SchedulerType}


def test_undeclared_keys_of_trl_are_passed_on_and_checked() -> None:
    section = TrainSection.model_validate({"torch_empty_cache_steps": 5, "eval_delay": 1})
    assert section.arguments() == {"torch_empty_cache_steps": 5, "eval_delay": 1}
    with pytest.raises(ValidationError, match=r"must be .*int.*, got 'often'"):
        TrainSection.model_validate({"torch_empty_cache_steps": "often"})


def test_arguments_make_an_sft_config(tmp_path: Path) -> None:
    from trl import SFTConfig

    section = TrainSection.model_validate(
        {"learning_rate": 1e-4, "max_length": 77, "packing": True, "bf16": False, "use_cpu": True, "logging_steps": 1}
    )
    config = SFTConfig(output_dir=str(tmp_path), **section.arguments())
    assert (config.learning_rate, config.max_length, config.packing) == (1e-4, 77, True)


def test_packaged_deepspeed_configurations() -> None:
    for stage in (1, 2, 3):
        path = find_deepspeed(f"zero{stage}")
        assert path is not None
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == stage
        assert TrainSection(deepspeed=f"zero{stage}").arguments() == {"deepspeed": str(path)}
        launch = yaml.safe_load((folder("configs") / "accelerate" / f"zero{stage}.yaml").read_text())
        assert launch["deepspeed_config"]["zero_stage"] == stage and launch["distributed_type"] == "DEEPSPEED"
    assert find_deepspeed("zero4") is None and find_deepspeed("../deepspeed/zero1") is None


def test_every_packaged_recipe_loads_and_has_a_title() -> None:
    recipes = list_recipes()
    assert {"gsm8k", "phi4-mini-flash", "phi4-mini-flash/lora", "phi4-mini-flash-dasd"} <= {r.name for r in recipes}
    for packaged in recipes:
        assert len(packaged.title) > 20, packaged.name
        assert load_recipe(packaged.name) == load_recipe(packaged.path)


def test_every_data_recipe_fits_a_stage(tmp_path: Path) -> None:
    found = list_data_recipes()
    assert {"gsm8k", "distill-stage1", "dasd-low"} <= {recipe.name for recipe in found}
    for packaged in found:
        path = tmp_path / "r.yaml"
        path.write_text(
            f"name: r\noutput_dir: o\nmodel: {{tokenizer: tiny, config: {{}}}}\n"
            f"stages: [{{name: s, data: {{recipe: {packaged.name}}}}}]\n"
        )
        licences = [source.license for source in _leaves(load_recipe(path).stages[0].data.sources)]
        # The card of Mixture-of-Thoughts names none.
        assert licences and (all(licences) or packaged.name == "mixture-of-thoughts"), packaged.name


def _leaves(sources: list[DataSource]) -> list[DataSource]:
    return [leaf for source in sources for leaf in (_leaves(source.sources) if source.sources else [source])]


def test_published_settings_of_the_real_recipes() -> None:
    distill, hard, long = load_recipe("phi4-mini-flash").stages
    for stage, length, packed in ((distill, 16384, True), (hard, 20480, False), (long, 32768, True)):
        assert (stage.train.max_length, stage.train.packing) == (length, packed)
    for stage in (distill, hard):
        rows = 8 * stage.train.per_device_train_batch_size * stage.train.gradient_accumulation_steps
        assert (rows, stage.train.learning_rate, stage.train.num_train_epochs) == (128, 1e-5, 5)
        assert stage.train.warmup_steps == 0.1
    low, high = load_recipe("phi4-mini-flash-dasd").stages
    for stage in (low, high):
        rows = 8 * stage.train.per_device_train_batch_size * stage.train.gradient_accumulation_steps
        assert (rows, stage.train.learning_rate, stage.train.max_length) == (64, 5e-5, 65536)
    slower = load_recipe("phi4-mini-flash-dasd", ["--variables.learning_rate", "2.5e-5"])
    assert slower.stages[1].train.learning_rate == 2.5e-5
    assert load_recipe("phi4-mini-flash/lora").stages[0].train.use_peft
