"""Chains of stages on whatever ranks there are: `python engine_cases.py FOLDER NAMES`; what each stage ran on, as JSON.

All cases run in the same processes, one after the other: what one leaves behind shows in the next. Under two ranks the
second always comes late.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "sliding_window": 16}
# A gradient that is nothing but rounding (of a key's bias, for one) must not become a step of the full size.
FULL = {"packing": True, "max_length": 96, "learning_rate": 2e-3, "max_steps": 3, "adam_epsilon": 1e-2, "use_cpu": True}
FULL |= {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 1}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
SUITE = {"name": "words", "source": {"generate": {"family": "words", "rows": 2, "split": "test"}}, "max_new_tokens": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "muon": {"optim": "muon"},
    "groups": {"param_groups": [{"match": "fc1", "learning_rate": 8e-3}, {"match": "norm|A_log", "weight_decay": 0.5}]},
    "checkpointing": {"gradient_checkpointing": True},
}
BATCH = 4
"""Rows of an optimizer step, however many ranks share them."""


def recipe_of(root: Path, *trains: dict[str, Any], suites: list[Any]) -> Any:
    """A recipe of stages s0, s1, ... that make the same steps on one rank and on two."""
    from sft.recipe.schema import Recipe
    from sft.utils.distributed import world_size

    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH // world_size()}
    stages = [
        {
            "name": f"s{index}",
            "data": {
                "sources": [{"generate": {"family": "words", "rows": 30, "seed": index}}],
                "validation": {"sources": [{"generate": {"family": "words", "rows": 5, "split": "test"}}]},
            },
            "train": {**FULL, **split, **train},
            "evaluate": {"suites": suites, "before_first_stage": False},
        }
        for index, train in enumerate(trains)
    ]
    model = {"config": MODEL, "tokenizer": "tiny", "dtype": "float32"}
    return Recipe.model_validate({"name": "engines", "output_dir": str(root), "model": model, "stages": stages})


def train_keys(word: str) -> dict[str, Any]:
    """`zero2.lora.checkpointing` as a stage's `train` keys; `none` is no engine."""
    engine, *more = word.split(".")
    keys: dict[str, Any] = {} if engine == "none" else {"deepspeed": engine}
    for option in more:
        keys |= OPTIONS[option]
    return keys


# ---- cases ----


def chain(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """Two stages with evaluations, and the export of what came out."""
    from sft.hub.export import export
    from sft.run.chain import run
    from sft.utils.distributed import decide

    stages = [{"bf16": precision == "bf16", **train_keys(word)} for word in words]
    paths_before, seen = patched_places(), Seen()
    before = dict(os.environ)
    with seen:
        result = run(recipe_of(root, *stages, suites=[SUITE]))
    changed = sorted(key for key in {*before, *os.environ} if before.get(key) != os.environ.get(key))
    last = root / "stages" / f"s{len(words) - 1}" / "final"
    decide(lambda: str(export(last, root / "export", dtype="float32", check=False)))
    kept = ("engine", "zero_stage", "world_size", "precision", "steps")
    return {
        "manifests": [{key: manifest.get(key) for key in kept} for manifest in result["stages"].values()],
        "seen": seen.stages,
        "evaluations": sorted(result["evaluations"]),
        "environment": changed,
        "left": sorted(name for name, value in patched_places().items() if value is not paths_before[name]),
    }


def still(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """A stage that goes nowhere: at a learning rate of zero."""
    from sft.run.chain import train

    stage = {"bf16": precision == "bf16", "learning_rate": 0.0, "max_steps": 1, **train_keys(words[0])}
    (manifest,) = train(recipe_of(root, stage, suites=[]))["stages"].values()
    return {"steps": manifest["steps"]}


def resumed(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """A stage whose process ends in its third step, then one that ends in the hand-over, each begun again."""
    from sft.run.chain import train

    recipe = recipe_of(root, {"bf16": precision == "bf16", "save_steps": 2, **train_keys(words[0])}, suites=[])
    ends = []
    for place, when in (("sft.train.trainer.SambayTrainer.training_step", 5), ("sft.train.hand_on.whole_weights", 1)):
        with patch(place, autospec=True, side_effect=killed_in(place, when)):
            ends.append(outcome(lambda: train(recipe)))
    (manifest,) = train(recipe)["stages"].values()
    return {"ends": ends, "steps": manifest["steps"], "engine": manifest["engine"]}


def best(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """A stage that hands on the best of its checkpoints; which processes have made the answers."""
    from sft.recipe.schema import Recipe
    from sft.run.chain import train

    keys = {"bf16": precision == "bf16", "save_steps": 1, "save_total_limit": 2, **train_keys(words[0])}
    dumped = recipe_of(root, keys, suites=[SUITE | {"batch_size": 1}]).model_dump()
    dumped["stages"][0]["keep_best"] = "words"
    answered: list[int] = []
    with patch("sft.generate.generate_batch", side_effect=counted("sft.generate.generate_batch", answered)):
        (manifest,) = train(Recipe.model_validate(dumped))["stages"].values()
    return {"best": manifest["best"], "parents": len(manifest["average"]), "asked": sum(answered)}


def launched(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """The environment that `accelerate launch` with a DeepSpeed configuration makes, and a recipe that says nothing."""
    told = {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_MIXED_PRECISION": precision.replace("fp32", "no"),
        "ACCELERATE_DEEPSPEED_ZERO_STAGE": words[0].removeprefix("zero"),
        "ACCELERATE_DEEPSPEED_ZERO3_INIT": "true",
        "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "false",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    }
    from sft.run.chain import train

    seen = Seen()
    with patch.dict(os.environ, told), seen:
        (manifest,) = train(recipe_of(root, {}, suites=[]))["stages"].values()
        kept = {key: os.environ.get(key) for key in told} == told
    return {"seen": seen.stages, "kept": kept, "zero_stage": manifest["zero_stage"], "precision": manifest["precision"]}


def unlike(root: Path, words: list[str], precision: str) -> dict[str, Any]:
    """Ranks that would train different things, because each has a recipe of its own."""
    from sft.run.chain import train
    from sft.train import what_runs
    from sft.utils.distributed import rank

    original = what_runs.asked_engine

    def own_engine(*args: Any, **kwargs: Any) -> Any:
        return {**original(*args, **kwargs), "precision": f"that of rank {rank()}"}

    with patch("sft.train.what_runs.asked_engine", own_engine):
        return {"end": outcome(lambda: train(recipe_of(root, train_keys(words[0]), suites=[])))}


KINDS: dict[str, Callable[[Path, list[str], str], dict[str, Any]]] = {
    "chain": chain,
    "still": still,
    "resumed": resumed,
    "best": best,
    "launched": launched,
    "unlike": unlike,
}


# ---- what is looked at ----


class Killed(BaseException):
    """Raised as if the process had ended there."""


def killed_in(place: str, when: int) -> Callable[..., Any]:
    """In place of a function: its calls go through, but for the one with number `when`."""
    from pkgutil import resolve_name

    original, calls = resolve_name(place), itertools.count(1)

    def function(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            raise Killed(place)
        return original(*args, **kwargs)

    return function


def counted(place: str, calls: list[int]) -> Callable[..., Any]:
    """In place of a function: its calls go through and are counted."""
    from pkgutil import resolve_name

    original = resolve_name(place)

    def function(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    return function


def outcome(function: Callable[[], Any]) -> str:
    """How a call ended: the error's type and text."""
    try:
        function()
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return "went through"


class Seen:
    """While active, what really runs, asked of the objects themselves at a stage's first step."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []

    def __enter__(self) -> Seen:
        from sft.train.trainer import SambayTrainer

        original, seen = SambayTrainer.compute_loss, self

        def compute_loss(trainer: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
            # Noted on the trainer itself: the next one may get the same id.
            if hasattr(trainer, "was_seen") or not trainer.model.training:
                return original(trainer, model, *args, **kwargs)
            trainer.was_seen = True
            linear = next(m for name, m in trainer.model.named_modules() if name.endswith("mlp.fc1"))
            types: list[str] = []
            handle = linear.register_forward_hook(lambda module, inputs, output: types.append(str(output.dtype)))
            loss = original(trainer, model, *args, **kwargs)
            handle.remove()
            seen.stages.append({**what_runs(model), "activations": types[0]})
            return loss

        self._patch = patch.object(SambayTrainer, "compute_loss", compute_loss)
        self._patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.stop()


def what_runs(model: Any) -> dict[str, Any]:
    """The wrapper's class, its ZeRO stage, the ranks it knows of, and the types of the weights it holds."""
    import torch

    deepspeed = type(model).__name__ == "DeepSpeedEngine"
    return {
        "engine": type(model).__name__,
        "zero_stage": model.zero_optimization_stage() if deepspeed else None,
        "ranks": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "weights": sorted({str(p.dtype) for p in model.parameters()}),
        "partitioned": any(hasattr(p, "ds_id") for p in model.parameters()),
    }


def patched_places() -> dict[str, Any]:
    """What engines are known to put in torch and leave there, and where they keep themselves."""
    import torch
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers.integrations.deepspeed import deepspeed_config, is_deepspeed_zero3_enabled

    places = {
        f"{owner.__name__}.{name}": getattr(owner, name)
        for owner, name in ((torch.nn.functional, "linear"), (torch, "empty"), (torch, "zeros"), (torch, "tensor"))
    }
    places |= {"Module.__init__": torch.nn.Module.__init__, "Tensor.__new__": torch.Tensor.__new__}
    states = {state.__name__: state._shared_state == {} for state in (PartialState, AcceleratorState, GradientState)}
    return {**places, **states, "config": deepspeed_config(), "zero3": is_deepspeed_zero3_enabled()}


def main() -> None:
    import sft.hub.export
    import sft.run.chain
    from sft.utils.distributed import rank, world_size

    assert sft.run.chain and sft.hub.export
    gc.freeze()  # or every stage looks through all that was imported, whenever it collects

    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    results: dict[str, Any] = {}
    for name in names:
        kind, words, precision = name.split("-")
        time.sleep(0.3 * rank())
        try:
            results[name] = KINDS[kind](folder / f"{world_size()}" / name, words.split("+"), precision)
        except BaseException as error:
            results[name] = {"error": "".join(traceback.format_exception(error))}
        (folder / f"{world_size()}-{rank()}.json").write_text(json.dumps(results))
        if "error" in results[name]:
            sys.exit(f"{name}: {results[name]['error']}")


if __name__ == "__main__":
    main()
