"""Every key of `train` does what it says: for each a check of what it changes, in rows, optimizer or adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import (
    read_metrics,
    saved_weights,
    tiny_qwen,
    tiny_tokenizer,
    toy_recipe,
    toy_rows,
    train_toy,
)

from sft.recipe import RunPaths, TrainSection
from sft.train.arguments import build_arguments
from sft.train.collator import PaddedCollator
from sft.train.engine import fresh_engine
from sft.train.job import training_rows
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError

Check = Callable[["Toy"], None]
EFFECTS: dict[str, Check] = {}


def effect(*keys: str) -> Callable[[Check], Check]:
    """Say which keys a check is for."""

    def note(check: Check) -> Check:
        EFFECTS.update(dict.fromkeys(keys, check))
        return check

    return note


@dataclass
class Toy:
    """What checks are made with."""

    root: Path
    patch: pytest.MonkeyPatch
    made: int = 0

    def _folder(self) -> Path:
        self.made += 1
        return self.root / str(self.made)

    def arguments(self, **train: Any) -> Any:
        """The SFTConfig of a stage with these keys."""
        recipe = toy_recipe(self._folder(), train)
        return build_arguments(recipe.stages[0], RunPaths(recipe), bf16=False)

    def trainer(self, model: Any = None, **train: Any) -> Any:
        """A trainer that hasn't begun, on 16 rows."""
        recipe = toy_recipe(self._folder(), train)
        args = build_arguments(recipe.stages[0], RunPaths(recipe), bf16=False)
        return SambayTrainer(
            tiny_qwen() if model is None else model,
            args=args,
            loss_scaling="sum",
            identity={},
            train=recipe.stages[0].train,
            data_collator=PaddedCollator(),
            train_dataset=training_rows(toy_rows(16, packed=False).dataset, args, "one"),
            processing_class=tiny_tokenizer(),
        )

    def group(self, **train: Any) -> dict[str, Any]:
        """The optimizer's first group of parameters."""
        trainer = self.trainer(**train)
        trainer.create_optimizer()
        return trainer.optimizer.param_groups[0]

    def rates(self, steps: int, **train: Any) -> list[float]:
        """The learning rate of each of `steps` steps, the largest being 1."""
        trainer = self.trainer(**{"learning_rate": 1.0, "max_steps": steps, **train})
        trainer.create_optimizer_and_scheduler(steps)
        found = []
        for _ in range(steps):
            found.append(trainer.lr_scheduler.get_last_lr()[0])
            trainer.optimizer.step()
            trainer.lr_scheduler.step()
        return found

    def train(self, **train: Any) -> tuple[dict[str, Any], RunPaths]:
        """A whole stage: its manifest and paths."""
        return train_toy(self._folder(), {"max_steps": 2, "per_device_train_batch_size": 4, **train})

    def losses(self, **train: Any) -> list[float]:
        return [line["loss"] for line in read_metrics(self.train(**train)[1].metrics("one"))]

    def steps(self, **train: Any) -> int:
        return int(self.train(**{"max_steps": -1, **train})[0]["steps"])

    def checkpoints(self, **train: Any) -> list[str]:
        folder = self.train(**{"max_steps": 6, **train})[1].stage_dir("one")
        return sorted(path.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*"))

    def adapter(self, **train: Any) -> Any:
        """A model with fresh adapters, as a stage makes them."""
        from sft.models.lora import attach_adapters, lora_settings

        stage = toy_recipe(self._folder(), {"use_peft": True, **train}).stages[0]
        return attach_adapters(tiny_qwen(), lora_settings(stage) or {}, seed=stage.train.seed)


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    with fresh_engine():
        yield Toy(tmp_path, monkeypatch)


def test_every_key_has_a_check() -> None:
    assert set(EFFECTS) == set(TrainSection.model_fields)


# Registered below, so they are looked up when the tests are collected.
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "check" in metafunc.fixturenames:
        checks = {check: "+".join(key for key in EFFECTS if EFFECTS[key] is check) for check in EFFECTS.values()}
        metafunc.parametrize("check", list(checks), ids=list(checks.values()))


def test_effect(check: Check, toy: Toy) -> None:
    check(toy)


# ---- rows ----


def _prepared(toy: Toy, **train: Any) -> Any:
    from sft.data.prepare import prepare_stage
    from sft.tokenizers.load import load_tokenizer

    recipe = toy_recipe(toy._folder(), train)
    data = recipe.stages[0].data.model_dump() | {"sources": [{"generate": {"rows": 40}}], "steps": ["length"]}
    stage = recipe.stages[0].model_validate({**recipe.stages[0].model_dump(), "data": data})
    return prepare_stage(recipe, stage, load_tokenizer("tiny"))


@effect("max_length", "packing")
def _(toy: Toy) -> None:
    whole, packed = _prepared(toy, max_length=4096), _prepared(toy, max_length=4096, packing=True)
    assert len(whole.dataset) == 40 > len(packed.dataset) and max(map(len, packed.dataset["seq_lengths"])) > 1
    assert _prepared(toy, max_length=100).manifest["funnel"]["dropped"]["over_length"] > 0
    assert max(map(len, _prepared(toy, max_length=400, packing=True).dataset["input_ids"])) <= 400


@effect("dataset_num_proc")
def _(toy: Toy) -> None:
    import sft.data.prepare as prepare

    asked, make = [], prepare.make_engine
    toy.patch.setattr(prepare, "make_engine", lambda name, count: asked.append(count) or make(name, 1))
    _prepared(toy, dataset_num_proc=3)
    assert asked == [3]


@effect("per_device_train_batch_size")
def _(toy: Toy) -> None:
    batch = next(
        iter(toy.trainer(per_device_train_batch_size=5, train_sampling_strategy="sequential").get_train_dataloader())
    )
    assert len(batch["input_ids"]) == 5


@effect("gradient_accumulation_steps", "num_train_epochs", "max_steps")
def _(toy: Toy) -> None:
    assert toy.steps(num_train_epochs=1) == 4
    assert toy.steps(num_train_epochs=1, gradient_accumulation_steps=2) == 2
    assert toy.steps(num_train_epochs=2.5) == 10
    assert toy.steps(num_train_epochs=2.5, max_steps=3) == 3


@effect("train_sampling_strategy")
def _(toy: Toy) -> None:
    orders = {}
    for strategy in ("random", "sequential", "group_by_length"):
        # A row a step: those of a step are dealt out by length in any case. Groups of four such steps are sorted.
        one = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1}
        trainer = toy.trainer(train_sampling_strategy=strategy, **one)
        rows = list(trainer._get_train_sampler())
        orders[strategy] = [sum(trainer.train_dataset[row]["seq_lengths"]) for row in rows]
        assert sorted(rows) == list(range(16))
        assert (rows == list(range(16))) == (strategy == "sequential")

    def is_sorted(strategy: str) -> list[bool]:
        fours = [orders[strategy][first : first + 4] for first in range(0, 16, 4)]
        return [four == sorted(four, reverse=True) for four in fours]

    # But for the longest row of all, which comes first.
    assert sum(is_sorted("group_by_length")) >= 3 and sum(is_sorted("random")) < 3


@effect("dataloader_drop_last")
def _(toy: Toy) -> None:
    rows = toy_rows(10, packed=False).dataset
    for drop, steps in ((False, 3), (True, 2)):
        args = toy.arguments(per_device_train_batch_size=4, dataloader_drop_last=drop)
        assert len(training_rows(rows, args, "one")) // 4 == steps


# ---- optimizer and schedule ----


@effect("loss", "distill")
def _(toy: Toy) -> None:
    plain = toy.losses()
    for loss in ({"type": "dft"}, {"normalize": "sample"}, {"label_smoothing": 0.2}, {"z_loss": 0.1}):
        assert toy.losses(loss=loss)[0] != plain[0]
    assert toy.losses(loss={"type": "nll", "normalize": "token"}) == plain
    with pytest.raises(UserError, match="reads teacher_ids, which the rows don't have"):
        toy.losses(distill={"weight": 0.5})


@effect("learning_rate")
def _(toy: Toy) -> None:
    assert toy.group(learning_rate=0.25)["lr"] == 0.25


@effect("lr_scheduler_type", "lr_scheduler_kwargs")
def _(toy: Toy) -> None:
    assert toy.rates(4, lr_scheduler_type="linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert toy.rates(4, lr_scheduler_type="constant") == [1] * 4
    assert toy.rates(4, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 2.0})[2] == pytest.approx(0.25)
    for scheduler in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        assert toy.rates(50, lr_scheduler_type=scheduler, lr_scheduler_kwargs={"min_lr": 0.3})[-1] >= 0.3
    stable = toy.rates(9, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs={"num_decay_steps": 3})
    assert stable[:6] == [1] * 6 and stable[7] < 1


@effect("warmup_steps")
def _(toy: Toy) -> None:
    for warmup in (4, 0.5):
        assert toy.rates(8, warmup_steps=warmup)[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])


@effect("optim", "optim_args")
def _(toy: Toy) -> None:
    for name, kind in (("sgd", "SGD"), ("adafactor", "Adafactor"), ("adamw_torch", "AdamW"), ("rmsprop", "RMSprop")):
        trainer = toy.trainer(optim=name)
        trainer.create_optimizer()
        assert type(trainer.optimizer).__name__ == kind
    group = toy.group(optim="sgd", optim_args="momentum=0.5, nesterov=true")
    assert (group["momentum"], group["nesterov"]) == (0.5, True)
    assert toy.group(optim="rmsprop", optim_args="alpha=0.7,centered=true")["alpha"] == 0.7
    assert toy.group(optim="adagrad", optim_args="lr_decay=0.1")["lr_decay"] == 0.1
    muon = toy.group(optim="muon", optim_args="ns_steps=3")
    assert (muon["ns_steps"], muon["momentum"], muon["adjust_lr_fn"]) == (3, 0.95, "match_rms_adamw")
    assert toy.group()["fused"] is True


@effect("adamw_learning_rate")
def _(toy: Toy) -> None:
    trainer = toy.trainer(optim="muon", learning_rate=0.25, adamw_learning_rate=0.125)
    trainer.create_optimizer()
    assert {(group["muon"], group["lr"]) for group in trainer.optimizer.param_groups} == {(True, 0.25), (False, 0.125)}


@effect("param_groups")
def _(toy: Toy) -> None:
    entries = [{"match": "q_proj", "learning_rate": 0.5, "weight_decay": 0.25}]
    for optim in ("adamw_torch_fused", "muon", "sgd"):
        trainer = toy.trainer(optim=optim, learning_rate=0.125, param_groups=entries)
        trainer.create_optimizer()
        found = {(group["lr"], group["weight_decay"]): len(group["params"]) for group in trainer.optimizer.param_groups}
        assert found[0.5, 0.25] == 2, "one of each layer"


@effect("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
def _(toy: Toy) -> None:
    group = toy.group(weight_decay=0.3, adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3)
    assert (group["weight_decay"], group["betas"], group["eps"]) == (0.3, (0.5, 0.6), 1e-3)


@effect("max_grad_norm")
def _(toy: Toy) -> None:
    start = tiny_qwen().state_dict()
    for limit, least, most in ((0.01, 0.009, 0.011), (0.0, 0.1, float("inf"))):
        keys = {"optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "max_grad_norm": limit}
        weights = saved_weights(toy.train(max_steps=1, **keys)[1].final_dir("one"))
        moved = torch.sqrt(sum((weights[name] - start[name]).square().sum() for name in weights))
        assert least < moved < most


@effect("sequence_parallel_size")
def _(toy: Toy) -> None:
    """What two and four do is seen in tests/distributed/test_sequence_parallel.py."""
    assert toy.trainer(sequence_parallel_size=1).row_ranks is None
    with pytest.raises(UserError, match="2 processes share a row, and the run has 1"):
        toy.arguments(sequence_parallel_size=2)


@effect("ema")
def _(toy: Toy) -> None:
    weights = [
        saved_weights(toy.train(max_steps=2, **keys)[1].final_dir("one"))["model.norm.weight"]
        for keys in ({}, {"ema": {"decay": 0.5, "start": 1}}, {"ema": {"decay": 0.5, "start": 2}})
    ]
    assert not torch.equal(weights[1], weights[0]) and torch.equal(weights[2], weights[0])


@effect("guard")
def _(toy: Toy) -> None:
    """More in tests/unit/train/test_guard.py."""
    original = SambayTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = original(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 0 else loss

    toy.patch.setattr(SambayTrainer, "training_step", training_step)
    assert toy.train()[0]["left_out"]["steps"] == [1]
    with pytest.raises(UserError, match="The loss is not a finite number at step 1"):
        toy.train(guard=None)


@effect("keep_optimizer", "stall_timeout")
def _(toy: Toy) -> None:
    """More in tests/unit/train/test_mishaps.py, where a stage hangs."""
    from sft.train import watchdog

    made: list[float] = []
    begin = watchdog.Watchdog.__init__
    toy.patch.setattr(
        watchdog.Watchdog,
        "__init__",
        lambda self, seconds, *rest: (made.append(seconds), begin(self, seconds, *rest))[0],
    )
    for keep in (True, False):
        paths = toy.train(keep_optimizer=keep, stall_timeout=77.0)[1]
        assert (paths.stage_dir("one") / "checkpoint-2/optimizer.pt").is_file() is keep
    toy.train(stall_timeout=None)
    assert made == [77.0, 77.0]


@effect("neftune_noise_alpha")
def _(toy: Toy) -> None:
    assert toy.losses(neftune_noise_alpha=20.0)[0] != toy.losses()[0]


# ---- computation ----


@effect("bf16")
def _(toy: Toy) -> None:
    assert toy.trainer(bf16=True).accelerator.mixed_precision == "bf16"
    assert toy.trainer(bf16=False).accelerator.mixed_precision == "no"


@effect("tf32")
def _(toy: Toy) -> None:
    switched: list[bool] = []
    toy.patch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    toy.patch.setattr("transformers.training_args.enable_tf32", switched.append)
    for value in (True, False, None):
        toy.arguments(tf32=value)
    assert switched == [True, False]


@effect("use_cpu")
def _(toy: Toy) -> None:
    toy.patch.setattr(torch.cuda, "is_available", lambda: True)
    args = toy.arguments(use_cpu=True)
    assert (args.use_cpu, args.device.type, args.bf16, args.dataloader_pin_memory) == (True, "cpu", False, False)


@effect("gradient_checkpointing", "gradient_checkpointing_kwargs")
def _(toy: Toy) -> None:
    passes = []
    for asked in (False, True):
        model, ran = tiny_qwen(), []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        kwargs = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if asked else {}
        train_toy(toy._folder(), {"max_steps": 1, "gradient_checkpointing": asked, **kwargs}, model=model)
        passes.append(len(ran))
    assert passes[1] > passes[0], "layers run again in the backward pass"
    assert model.model.layers[0]._gradient_checkpointing_func.keywords["use_reentrant"] is False
    model, keys = tiny_qwen(), {"max_steps": 1, "gradient_checkpointing": True}
    train_toy(toy._folder(), {**keys, "gradient_checkpointing_kwargs": {"selective": True}}, model=model)
    assert "context_fn" in model.model.layers[0]._gradient_checkpointing_func.keywords


def test_autocast_holds_no_weights_where_layers_are_computed_again(tmp_path: Path, monkeypatch: Any) -> None:
    for asked in (False, True):
        trainer = Toy(tmp_path / str(asked), monkeypatch).trainer(gradient_checkpointing=asked, bf16=True)
        handler = trainer.accelerator.autocast_handler
        assert (handler is not None and not handler.cache_enabled) is asked


@effect("activation_offloading")
def _(toy: Toy) -> None:
    """Refused without a GPU; with one it is the inputs of layers, or without recomputation TRL's context."""
    asked: list[Any] = []
    toy.patch.setattr("sft.train.arguments._has_cuda", lambda: True)
    toy.patch.setattr("trl.trainer.sft_trainer.get_act_offloading_ctx_manager", lambda model: asked.append(model))
    keys = {"activation_offloading": True, "use_cpu": False, "bf16": False}
    toy.trainer(**keys, gradient_checkpointing=False)
    assert len(asked) == 1
    toy.trainer(**keys, gradient_checkpointing=True)
    toy.trainer()
    assert len(asked) == 1
    toy.patch.undo()
    sent: list[int] = []
    toy.patch.setattr("sft.train.stage.check_arguments", lambda stage: None, raising=False)
    toy.patch.setattr("sft.train.offload.Link.send", lambda link, tensor: sent.append(1) or tensor)
    train_toy(toy._folder(), {"max_steps": 1, "gradient_checkpointing": True, "activation_offloading": True})
    assert sent


@effect("weights_dtype", "optim_state_dtype")
def _(toy: Toy) -> None:
    keys = {"max_steps": 1, "bf16": True, "save_steps": 1, "keep_optimizer": True}
    for own in (
        {"weights_dtype": "float32"},
        {"weights_dtype": "bfloat16"},
        {"weights_dtype": "bfloat16", "optim_state_dtype": "bfloat16"},
    ):
        model = tiny_qwen()
        folder = train_toy(toy._folder(), {**keys, **own}, model=model)[1].stage_dir("one") / "checkpoint-1"
        assert {p.dtype for n, p in model.named_parameters() if "norm" in n} == {torch.float32}
        assert model.model.layers[0].mlp.up_proj.weight.dtype == getattr(torch, own["weights_dtype"])
        states = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
        held = {state["exp_avg"].dtype for state in states}
        assert held == {torch.float32, getattr(torch, own.get("optim_state_dtype", "float32"))}


@effect("torch_empty_cache_steps")
def _(toy: Toy) -> None:
    emptied: list[int] = []
    toy.patch.setattr("transformers.trainer.clear_device_cache", lambda: emptied.append(1))
    toy.train(max_steps=4, torch_empty_cache_steps=2)
    assert len(emptied) == 2


@effect("deepspeed")
def _(toy: Toy) -> None:
    for stage in (1, 2):
        args = toy.arguments(deepspeed=f"zero{stage}")
        assert args.deepspeed["zero_optimization"]["stage"] == stage == args.deepspeed_plugin.zero_stage
        toy.patch.undo()


# ---- what is told and kept ----


@effect("logging_steps", "logging_first_step")
def _(toy: Toy) -> None:
    def lines(**train: Any) -> list[int]:
        return [line["step"] for line in read_metrics(toy.train(max_steps=6, **train)[1].metrics("one"))]

    assert lines(logging_steps=2) == [2, 4, 6]
    assert lines(logging_steps=0.5) == [3, 6]
    assert lines(logging_steps=3, logging_first_step=True) == [1, 3, 6]


@effect("log_level")
def _(toy: Toy) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity()
    try:
        for level, number in (("error", logging.ERROR), ("info", logging.INFO)):
            toy.trainer(log_level=level)
            assert logging.get_verbosity() == number
    finally:
        logging.set_verbosity(before)


@effect("report_to")
def _(toy: Toy) -> None:
    here = ["wandb", "codecarbon", "tensorboard"]
    toy.patch.setattr("transformers.integrations.get_available_reporting_integrations", lambda: here)
    for asked in ("all", here):
        assert toy.arguments(report_to=asked).report_to == ["codecarbon"]  # wandb is told by sft.train.trackers
    assert toy.arguments(report_to="none").report_to == []


@effect("run_name", "project", "trackio_space_id", "trackio_bucket_id")
def _(toy: Toy) -> None:
    """Of what a tracker is opened with; it is on the Hub where it may be, and private."""
    opened: list[tuple[str, dict[str, Any]]] = []
    toy.patch.setattr("trackio.init", lambda project, **settings: opened.append((project, settings)))
    toy.patch.setattr("sft.train.trackers.Trackio.log", lambda *given: None)
    toy.patch.setattr("sft.train.trackers.Trackio.end", lambda *given: None)
    toy.train(max_steps=1, report_to="trackio")
    toy.train(max_steps=1, report_to="trackio", run_name="mine", project="sums")
    toy.train(max_steps=1, report_to="trackio", trackio_space_id="me/page", trackio_bucket_id="me/rows")
    toy.patch.setenv("TRACKIO_PROJECT", "theirs")
    toy.train(max_steps=1, report_to="trackio", project="sums")
    assert [project for project, _ in opened] == ["huggingface", "sums", "huggingface", "theirs"]
    for (_, settings), name in zip(opened, ("toy", "mine", "toy", "toy"), strict=True):
        group, stage = settings["name"].rsplit("-", 1)
        assert (stage, group) == ("one", settings["group"]) and re.fullmatch(rf"{name}-[0-9a-f]{{4}}", group)
        assert settings["resume"] == "never"
    space = {"space_id": "me/page", "bucket_id": "me/rows", "private": True}
    assert space.items() <= opened[2][1].items() and not space.keys() & opened[0][1].keys()


@effect("eval_strategy", "eval_steps", "per_device_eval_batch_size")
def _(toy: Toy) -> None:
    """Of 5 held-out rows, `sizes` are those of the batches that are taken at the start."""
    import sft.train.validation as validation

    sizes: list[int] = []
    share = validation._share
    toy.patch.setattr(validation, "_share", lambda *given: _noted(sizes, share(*given)))

    def steps(**train: Any) -> list[int]:
        train = {"per_device_train_batch_size": 8, "num_train_epochs": 3, **train}
        rows = toy_rows(16, packed=False, held_out=5)
        _, paths = train_toy(toy._folder(), train, prepared=rows)
        return [line["step"] for line in read_metrics(paths.metrics("one")) if "eval_loss" in line]

    assert steps() == steps(eval_strategy="no") == [0, 6]
    assert steps(eval_strategy="steps", eval_steps=4) == [0, 4, 6]
    assert steps(eval_strategy="steps", logging_steps=5) == [0, 5, 6]
    assert steps(eval_strategy="epoch") == [0, 2, 4, 6]
    sizes.clear()
    assert steps(per_device_eval_batch_size=2) == [0, 6] and sizes == [2, 2, 1] * 2


def _noted(sizes: list[int], batches: Any) -> Any:
    for batch in batches:
        sizes.append(len(batch))
        yield batch


@effect("save_strategy", "save_steps", "save_total_limit")
def _(toy: Toy) -> None:
    assert toy.checkpoints(save_steps=2, save_total_limit=None) == ["2", "4", "6"]
    assert toy.checkpoints(save_steps=2) == ["4", "6"]
    assert toy.checkpoints(save_steps=0.5) == ["3", "6"]
    assert toy.checkpoints(save_strategy="no") == []
    assert toy.checkpoints(save_strategy="epoch", save_total_limit=1) == ["6"]


# ---- chance, and workers ----


@effect("seed")
def _(toy: Toy) -> None:
    drawn = [toy.adapter(seed=seed).state_dict() for seed in (1, 1, 2)]
    name = next(name for name in drawn[0] if "lora_A" in name)
    assert torch.equal(drawn[0][name], drawn[1][name]) and not torch.equal(drawn[0][name], drawn[2][name])
    orders = [list(toy.trainer(seed=seed)._get_train_sampler()) for seed in (1, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@effect("data_seed")
def _(toy: Toy) -> None:
    orders = [list(toy.trainer(seed=1, data_seed=seed)._get_train_sampler()) for seed in (None, 1, 2)]
    assert orders[0] == orders[1] != orders[2]


@effect("full_determinism")
def _(toy: Toy) -> None:
    for asked in (True, False):
        with fresh_engine():
            toy.trainer(full_determinism=asked)
            assert torch.are_deterministic_algorithms_enabled() is asked
        assert not torch.are_deterministic_algorithms_enabled()


@effect("dataloader_num_workers", "dataloader_prefetch_factor", "dataloader_persistent_workers")
def _(toy: Toy) -> None:
    keys = {"dataloader_num_workers": 2, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True}
    loader = toy.trainer(**keys).get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor, loader.persistent_workers) == (2, 3, True)


@effect("dataloader_pin_memory")
def _(toy: Toy) -> None:
    toy.patch.setattr("sft.train.arguments._has_cuda", lambda: True)
    keys = {"use_cpu": False, "bf16": False, "gradient_checkpointing": False}
    for pinned in (True, False):
        assert toy.trainer(dataloader_pin_memory=pinned, **keys).get_train_dataloader().pin_memory is pinned


# ---- adapters ----


@effect("use_peft")
def _(toy: Toy) -> None:
    _, paths = toy.train(use_peft=True)
    assert json.loads((paths.final_dir("one") / "adapter_config.json").read_text())["peft_type"] == "LORA"
    assert not (toy.train()[1].final_dir("one") / "adapter_config.json").exists()


@effect("lora_r", "lora_alpha", "lora_dropout", "use_rslora")
def _(toy: Toy) -> None:
    for rslora, scaling in ((False, 3.0), (True, 6.0)):
        model = toy.adapter(lora_r=4, lora_alpha=12, lora_dropout=0.25, use_rslora=rslora)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        assert layer.lora_A["default"].weight.shape == (4, 32) and layer.scaling["default"] == scaling
        assert layer.lora_dropout["default"].p == 0.25


@effect("lora_target_modules", "lora_target_parameters", "lora_modules_to_save")
def _(toy: Toy) -> None:
    model = toy.adapter(
        lora_target_modules=["q_proj"],
        lora_target_parameters=["up_proj.weight"],
        lora_modules_to_save=["norm"],
        lora_dropout=0.0,
    )
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in ("q_proj.lora_A", "up_proj.lora_A", "model.norm.modules_to_save"):
        assert any(part in name for name in trained), part
    assert all(any(part in name for part in ("q_proj", "up_proj", "norm")) for name in trained)


@effect("use_dora")
def _(toy: Toy) -> None:
    assert any("lora_magnitude_vector" in name for name, _ in toy.adapter(use_dora=True).named_parameters())
