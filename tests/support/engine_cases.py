"""Chains of stages on whatever ranks there are: `python engine_cases.py FOLDER NAMES`; what each stage ran on, as JSON.

All cases run in the same processes, one after the other: what one leaves behind shows in the next.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

MODEL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8, "num_attention_heads": 4}
MODEL |= {"num_key_value_heads": 2, "sliding_window": 16}
FULL = {"packing": True, "max_length": 96, "learning_rate": 2e-3, "max_steps": 3, "use_cpu": True, "adam_epsilon": 1e-2}
LORA = {"use_peft": True, "lora_r": 4, "lora_dropout": 0.0}
SUITE = {"name": "words", "source": {"generate": {"family": "words", "rows": 2, "split": "test"}}, "max_new_tokens": 4}
BATCH = 4
"""Rows of an optimizer step, however many ranks share them."""


def recipe_of(root: Path, *trains: dict[str, Any], **overrides: Any) -> Any:
    """A recipe of stages s0, s1, ... that make the same steps on one rank and on two."""
    from sft.recipe.schema import Recipe
    from sft.utils.distributed import world_size

    split = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": BATCH // world_size()}
    stages = [
        {
            "name": f"s{index}",
            "data": {"sources": [{"generate": {"family": "words", "rows": 30, "seed": index}}]},
            "train": {**FULL, **split, **train},
            "evaluate": {"suites": [SUITE]},
        }
        for index, train in enumerate(trains)
    ]
    recipe = {"name": "engines", "output_dir": str(root), "model": {"config": MODEL, "tokenizer": "tiny"}}
    return Recipe.model_validate({**recipe, "stages": stages, **overrides})


def engine(name: str) -> dict[str, Any]:
    """`zero2` as a stage's `train` key; `none` is no key."""
    return {} if name == "none" else {"deepspeed": name}


def run_case(root: Path, name: str) -> dict[str, Any]:
    """A case by name: `zero2-bf16` is two stages on ZeRO-2 in bf16, `zero2+none-fp32` a stage on each engine."""
    from sft.run.chain import run

    engines, precision = name.split("-")
    first, _, second = engines.partition("+")
    common = {"bf16": precision == "bf16"}
    stages = [
        {**common, **engine(first.removesuffix(".lora"))},
        {**common, **engine((second or first).removesuffix(".lora"))},
    ]
    for stage, asked in zip(stages, (first, second), strict=True):
        stage |= LORA if asked.endswith(".lora") else {}
    before = dict(os.environ)
    result = run(recipe_of(root / name, *stages, model={"config": MODEL, "tokenizer": "tiny", "dtype": "float32"}))
    changed = sorted(key for key in {*before, *os.environ} if before.get(key) != os.environ.get(key))
    kept = ("engine", "zero_stage", "world_size", "steps", "precision")
    return {
        "stages": {stage: {key: manifest.get(key) for key in kept} for stage, manifest in result["stages"].items()},
        "evaluations": sorted(result["evaluations"]),
        "environment": changed,
    }


def main() -> None:
    from sft.utils.distributed import rank, world_size

    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    results: dict[str, Any] = {}
    for name in names:
        try:
            results[name] = run_case(folder / f"{world_size()}", name)
        except BaseException as error:
            results[name] = {"error": "".join(traceback.format_exception(error))}
        (folder / f"{world_size()}-{rank()}.json").write_text(json.dumps(results))
        if "error" in results[name]:
            sys.exit(1)


if __name__ == "__main__":
    main()
