"""Stages whose rows several ranks share, and the same on one: `python sequence_cases.py FOLDER NAMES`.

A name is `SIZE.ENGINE[.OPTION...]`, such as `2.zero2.lora`; all run in the same processes, one after the other. Where
there is a third word, four ranks do `share_cases` after them.
"""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import share_cases
from train_toys import tiny_sambay, toy_rows, train_toy

from sft.train.trainer import SambayTrainer

STEPS, ROWS, BATCH = 30, 26, 4
"""Rows of a step: the groups of ranks that have rows of their own share them."""
COMMON: dict[str, Any] = {
    "learning_rate": 2e-3,
    "lr_scheduler_type": "cosine",
    "max_steps": STEPS,
    "per_device_train_batch_size": 1,
    # A gradient that is nothing but rounding (of a key's bias, for one) must not become a step of the full size.
    "adam_epsilon": 1e-2,
    "packing": True,
    "eval_strategy": "steps",
    "eval_steps": 15,
    "per_device_eval_batch_size": 2,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"use_peft": True, "lora_r": 4, "lora_dropout": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "documents": {"loss": {"type": "dft", "normalize": "sample", "label_smoothing": 0.05}},
    "two": {"per_device_train_batch_size": 2},
    "bf16": {"bf16": True},
    "few": {"max_steps": 3},
    "killed": {"save_steps": 2},
}


def train_keys(name: str, world_size: int) -> dict[str, Any]:
    size, engine, *options = name.split(".")
    keys = {**COMMON, "sequence_parallel_size": int(size)}
    if engine != "none":
        keys["deepspeed"] = engine
    for option in options:
        keys |= OPTIONS[option]
    groups = world_size // int(size)
    keys["gradient_accumulation_steps"] = BATCH // groups // keys["per_device_train_batch_size"]
    return keys


class Killed(BaseException):
    """Raised as if the process had ended there."""


def killed_in_the_third_step(root: Path, keys: dict[str, Any], rows: Any) -> None:
    original, calls = SambayTrainer.training_step, itertools.count(1)

    def training_step(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == 2 * keys["gradient_accumulation_steps"] + 2:
            raise Killed
        return original(*args, **kwargs)

    with patch.object(SambayTrainer, "training_step", training_step), suppress(Killed):
        train_toy(root, keys, model=tiny_sambay(), prepared=rows)


def main() -> None:
    from sft.utils.distributed import rank, world_size

    folder, names = Path(sys.argv[1]), sys.argv[2].split(",")
    found = {}
    for name in names:
        rows = toy_rows(ROWS, packed=True, longest=40, held_out=5)
        keys = train_keys(name, world_size())
        root = folder / f"{world_size()}-{name}"
        if "killed" in name:
            killed_in_the_third_step(root, keys, rows)
        manifest, _ = train_toy(root, keys, model=tiny_sambay(), prepared=rows)
        kept = ("engine", "zero_stage", "world_size", "sequence_parallel_size", "collator", "counters")
        found[name] = {key: manifest[key] for key in kept}
    (folder / f"{world_size()}-{rank()}.json").write_text(json.dumps(found))
    if sys.argv[3:]:
        share_cases.main(folder)


if __name__ == "__main__":
    main()
