"""The `train` section against the installed TRL: every key of its is honoured, or refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import ValidationError

from sft.recipe import TrainSection, load_recipe
from sft.recipe.optimizer_keys import OWN_OPTIMIZERS, warmup_of
from sft.recipe.packaged import find_deepspeed, folder, list_data_recipes, list_recipes
from sft.recipe.refused_keys import FIXED, REFUSED
from sft.recipe.schema import DataSource
from sft.recipe.train_keys import LORA_KEYS, NEUTRAL, OWN_KEYS, Optimizer, Scheduler


@pytest.fixture(scope="module")
def fields() -> dict[str, dataclasses.Field[Any]]:
    """Every key that users of TRL may write: its SFTConfig's and its ModelConfig's."""
    from trl import ModelConfig, SFTConfig

    return {field.name: field for kind in (ModelConfig, SFTConfig) for field in dataclasses.fields(kind)}


def test_every_key_of_trl_is_offered_or_refused_with_a_reason(fields: dict[str, dataclasses.Field[Any]]) -> None:
    offered, refused, fixed = set(TrainSection.model_fields), set(REFUSED), set(FIXED)
    assert set(fields) <= offered | refused | fixed
    assert not offered & refused and not offered & fixed and not refused & fixed
    assert (offered | fixed) - OWN_KEYS <= set(fields), "these would not reach TRL"
    assert not OWN_KEYS & set(fields) and offered >= OWN_KEYS


def test_every_offered_key_is_described() -> None:
    assert [key for key, field in TrainSection.model_fields.items() if not field.description] == []


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_refused_keys_say_why(key: str) -> None:
    for value in (True, False, None, 0, "x", {}):
        with pytest.raises(ValidationError, match=r"is not for recipes: .{10,}"):
            TrainSection.model_validate({key: value})


@pytest.mark.parametrize("key", sorted(FIXED))
def test_fixed_keys_take_what_is_done_anyway(key: str) -> None:
    value, _ = FIXED[key]
    assert TrainSection.model_validate({key: value}) == TrainSection()
    for other in (not value, None, "x", 7, [value]):
        with pytest.raises(ValidationError, match=r"must be \w+: .{10,}"):
            TrainSection.model_validate({key: other})


DECAYS = {"lr_scheduler_type": "warmup_stable_decay"}


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ({"max_steps": 0}, "max_steps\n  0 trains nothing"),
        ({"logging_steps": 1.5}, "logging_steps\n  is a whole number of steps"),
        ({"save_steps": 2.5}, "save_steps\n  is a whole number"),
        ({"warmup_steps": 10.5}, "warmup_steps\n  is a whole number"),
        ({"packing": True, "max_length": None}, "max_length\n  packing needs a length"),
        ({"dataloader_persistent_workers": True}, "has no effect without dataloader_num_workers"),
        ({"dataloader_prefetch_factor": 2}, "has no effect without dataloader_num_workers"),
        ({"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1\n  has no effect with optim sgd"),
        ({"optim": "lion_8bit", "adam_epsilon": 1e-6}, "adam_epsilon\n  has no effect with optim lion_8bit"),
        ({"optim_args": "momentum=0.9"}, "adamw_torch_fused takes none"),
        ({"optim": "sgd", "optim_args": "momentm=0.9"}, "sgd takes momentum, dampening, nesterov"),
        ({"optim": "sgd", "optim_args": "momentum"}, "momentum must be a number, got ''"),
        ({"optim": "sgd", "optim_args": "momentum=0.9, momentum=0.1"}, "optim_args\n  says momentum twice"),
        ({"optim": "sgd", "optim_args": "nesterov=1"}, "nesterov must be true or false"),
        ({"optim": "muon", "optim_args": "ns_steps=0"}, "ns_steps must be a whole number from 1 to 99, got '0'"),
        ({"optim": "muon", "optim_args": "adjust_lr_fn=x"}, "adjust_lr_fn must be one of match_rms_adamw, original"),
        ({"optim": "muon", "optim_args": "momentum=1"}, "momentum must be a number from 0 up to, but not, 1, got '1'"),
        ({"optim": "muon", "optim_args": "momentum=0,nesterov=true"}, "nesterov=true needs a momentum above 0"),
        ({"optim": "muon", "optim_args": "lr=1"}, "muon takes momentum, nesterov, ns_steps, adjust_lr_fn, each as"),
        (
            {"sequence_parallel_size": 2, "neftune_noise_alpha": 5.0},
            "neftune_noise_alpha\n  follows from whole documents, which no process has",
        ),
        ({"sequence_parallel_size": 0}, "sequence_parallel_size\n  Input should be greater than 0"),
        ({"adamw_learning_rate": 1e-3}, "adamw_learning_rate\n  has no effect with optim adamw_torch_fused"),
        ({"param_groups": []}, "param_groups\n  List should have at least 1 item"),
        ({"param_groups": [{"match": "("}]}, "param_groups.0.match\n  '(' is no regular expression: missing )"),
        ({"param_groups": [{"match": "A_log"}]}, "param_groups.0\n  says neither learning_rate nor weight_decay"),
        (
            {"param_groups": [{"match": "", "learning_rate": 1.0}]},
            "param_groups.0.match\n  String should have at least",
        ),
        ({"param_groups": [{"match": "x", "lr": 1.0}]}, "param_groups.0.lr\n  Extra inputs are not permitted"),
        ({"optim": "adam_of_old"}, "Input should be 'adamw_torch_fused'"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "has no effect with lr_scheduler_type constant"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "Input should be 'linear'"),
        *(
            (
                {"lr_scheduler_type": kind, "learning_rate": 0.0, "lr_scheduler_kwargs": {"min_lr": 0.0}},
                "lr_scheduler_kwargs.min_lr\n  is taken as a share of learning_rate, which is 0: set min_lr_rate",
            )
            for kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr")
        ),
        (
            {**DECAYS, "max_steps": 6, "lr_scheduler_kwargs": {"num_decay_steps": 10}},
            "num_decay_steps\n  must be at most 6, which is what the stage's steps (6) leave, got 10",
        ),
        (
            {**DECAYS, "max_steps": 20, "warmup_steps": 0.3, "lr_scheduler_kwargs": {"num_decay_steps": 15}},
            "num_decay_steps\n  must be at most 14, which is what the stage's steps (20) leave after warm-up, got 15",
        ),
        (
            {
                **{**DECAYS, "max_steps": 20, "warmup_steps": 2},
                "lr_scheduler_kwargs": {"num_decay_steps": 4, "num_stable_steps": 15},
            },
            "must be at most 3, which is what the stage's steps (20) leave after warm-up and num_stable_steps, got 4",
        ),
        (
            {"lr_scheduler_type": "polynomial", "max_steps": 2, "warmup_steps": 2},
            "warmup_steps\n  leaves polynomial none of the stage's steps (2) to fall in",
        ),
        ({"gradient_checkpointing_kwargs": {"preserve_rng_state": False}}, "isn't offered"),
        ({"gradient_checkpointing_kwargs": {"selective": "yes"}}, "must be true or false"),
        (
            {"gradient_checkpointing": False, "gradient_checkpointing_kwargs": {"selective": True}},
            "has no effect without gradient_checkpointing",
        ),
        ({"optim_state_dtype": "bfloat16"}, "has no effect without `weights_dtype: bfloat16`"),
        ({"weights_dtype": "bfloat16", "optim": "muon"}, "has an AdamW of its own, which muon isn't"),
        ({"weights_dtype": "bfloat16", "use_peft": True}, "has no effect with `use_peft: true`"),
        ({"weights_dtype": "bfloat16", "deepspeed": "zero2"}, "DeepSpeed keeps float32 copies"),
        ({"weights_dtype": "bfloat16", "bf16": False}, "needs products in bfloat16"),
        ({"lora_r": 16}, "lora_r\n  has no effect without `use_peft: true`"),
        ({"use_peft": True, "lora_target_modules": []}, "lora_target_modules\n  names nothing"),
        ({"learning_rate": float("inf")}, "finite"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"data_seed": 10**20}, "less than or equal to"),
        ({"torch_empty_cache_steps": "often"}, "valid integer"),
        ({"deepspeed": "x" * 300}, "no file"),
        ({"deepspeed": "a\0b"}, "no file"),
    ],
)
def test_values_that_do_nothing_or_cannot_be(keys: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        TrainSection.model_validate(keys)
    assert line in str(caught.value)


def test_a_schedule_that_fills_its_steps_fits_and_warm_up_is_counted_as_transformers_does(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    keys = {**DECAYS, "max_steps": 20, "warmup_steps": 0.26, "lr_scheduler_kwargs": {"num_decay_steps": 14}}
    TrainSection.model_validate(keys)
    TrainSection.model_validate({"lr_scheduler_type": "polynomial", "max_steps": 6, "warmup_steps": 50})
    for warmup in (0.0, 0.01, 0.26, 0.999, 1.0, 7.0):
        args = TrainingArguments(str(tmp_path), warmup_steps=warmup)
        for steps in (1, 3, 20, 1000):
            assert warmup_of(TrainSection(warmup_steps=warmup), steps) == args.get_warmup_steps(steps)


def test_effective_keys_are_all_but_neutral_ones_and_defaults_count() -> None:
    plain = TrainSection().effective()
    # As long as it is the default, a guard is none of what stages are known by that were trained before there was one.
    assert set(plain) == set(TrainSection.model_fields) - NEUTRAL - LORA_KEYS - {"guard"}
    for key, field in TrainSection.model_fields.items():
        if key not in LORA_KEYS:
            assert TrainSection.model_validate({key: field.default}).effective() == plain
    assert TrainSection(learning_rate=1e-3).effective() != plain
    assert TrainSection(save_steps=7, logging_steps=3, report_to="wandb").effective() == plain
    assert TrainSection(use_peft=True).effective() == TrainSection(use_peft=True, lora_r=16).effective() != plain
    assert json.loads(json.dumps(plain)) == plain


def test_a_deepspeed_file_counts_by_its_content(tmp_path: Path) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"zero_optimization": {"stage": 2}}')
    before = TrainSection(deepspeed=str(file)).effective()
    assert before == TrainSection(deepspeed={"zero_optimization": {"stage": 2}}).effective()
    file.write_text('{"zero_optimization": {"stage": 1}}')
    assert TrainSection(deepspeed=str(file)).effective() != before


def test_the_machine_decides_what_is_left_to_it() -> None:
    chosen = ("bf16", "gradient_checkpointing", "dataloader_pin_memory", "use_cpu")
    for section, cuda, bf16, expected in (
        (TrainSection(), True, True, [True, True, True, False]),
        (TrainSection(), False, False, [False, False, False, True]),
        (TrainSection(), False, True, [True, False, False, True]),
        (TrainSection(use_cpu=True), True, False, [False, False, False, True]),
        (TrainSection(bf16=True, gradient_checkpointing=True), False, False, [True, True, False, True]),
        (TrainSection(bf16=False), True, True, [False, True, True, False]),
    ):
        assert [section.complete(cuda=cuda, bf16=bf16)[key] for key in chosen] == expected


def test_schedulers_are_transformers() -> None:
    from transformers.trainer_utils import SchedulerType

    assert set(get_args(Scheduler)) <= {kind.value for kind in SchedulerType}


def test_optimizers_are_transformers() -> None:
    from transformers.training_args import OptimizerNames

    assert set(get_args(Optimizer)) - set(OWN_OPTIMIZERS) <= {kind.value for kind in OptimizerNames}


def test_packaged_deepspeed_configurations() -> None:
    for stage in (1, 2, 3):
        path = find_deepspeed(f"zero{stage}")
        assert path is not None
        assert json.loads(path.read_text())["zero_optimization"]["stage"] == stage
        assert TrainSection(deepspeed=f"zero{stage}").arguments(cuda=False, bf16=False)["deepspeed"] == str(path)
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


@pytest.mark.parametrize(
    ("key", "remedy"),
    [
        ("sequence_len", "max_length"),  # axolotl
        ("sample_packing", "packing"),
        ("micro_batch_size", "per_device_train_batch_size"),
        ("adapter", "use_peft"),
        ("val_set_size", "data.validation"),
        ("cutoff_len", "max_length"),  # LLaMA-Factory
        ("finetuning_type", "use_peft"),
        ("lora_target", "lora_target_modules"),
        ("template", "model.chat_template"),
        ("train_on_prompt", "assistant tokens alone"),
    ],
)
def test_keys_of_other_trainers_are_told_by_their_name_here(key: str, remedy: str) -> None:
    assert remedy in REFUSED[key]
