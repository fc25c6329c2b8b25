"""A small recipe of two stages with a suite, started from a checkpoint, for tests of whole runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from sft.recipe import Recipe

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 16,
}


def write_problems(path: Path, rows: int, *, first: int = 0) -> Path:
    """Sums with their answers, one JSON line each."""
    lines = [{"question": f"What is {i} + {i + 1}?", "answer": f"{2 * i + 1}"} for i in range(first, first + rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_start(folder: Path, seed: int = 0) -> Path:
    """A checkpoint with random weights and the tiny tokenizer; other seeds give files of the same names and sizes."""
    import torch

    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
    from sft.tokenizers.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    ends = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = Phi4FlashConfig(**SHAPE, vocab_size=(len(tokenizer) + 63) // 64 * 64, bos_token_id=None, **ends)
    Phi4FlashForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def small_recipe(
    root: Path,
    *,
    stages: tuple[dict[str, Any], ...] = ({}, {}),
    first: dict[str, Any] | None = None,
    **overrides: Any,
) -> Recipe:
    """Stages `a`, `b`, ... of three steps with the given `train` keys; data, start and suite below `root`.

    `first`: keys of stage `a` beside these.
    """
    if not (root / "start").is_dir():
        write_start(root / "start")
        write_problems(root / "rows.jsonl", 16)
        write_problems(root / "held.jsonl", 3, first=50)
    columns = {"prompt": "question", "completion": "answer"}
    suite = {
        "name": "sums",
        "source": {"path": str(root / "held.jsonl")},
        "columns": {"problem": "question"},
        "max_new_tokens": 4,
    }
    base = {"max_steps": 3, "learning_rate": 2e-3, "per_device_train_batch_size": 4, "max_length": 96, "save_steps": 2}
    return Recipe.model_validate(
        {
            "name": "small",
            "output_dir": str(root / "run"),
            "model": {"model_name_or_path": str(root / "start"), "dtype": "float32"},
            "stages": [
                {
                    "name": name,
                    "data": {"sources": [{"path": str(root / "rows.jsonl"), "columns": columns}]},
                    "train": {**base, **train},
                    "evaluate": {"suites": [suite]},
                    **((first or {}) if name == "a" else {}),
                }
                for name, train in zip("abcd", stages, strict=False)
            ],
            **overrides,
        }
    )


def copy_run(source: Path, target: Path) -> Path:
    """A finished run's folder with all that it stands on, under another root."""
    shutil.copytree(source, target)
    return target


def results_of(result: dict[str, Any]) -> dict[str, Any]:
    """What two equal runs have in common: steps and losses of the stages, numbers of the evaluations."""
    timeless = ("key", "pass_at_1", "interval", "verdicts", "tokens", "content")
    return {
        "stages": {name: (told["steps"], told["final_loss"]) for name, told in result["stages"].items()},
        "evaluations": {
            point: {suite: {key: found[key] for key in timeless} for suite, found in suites.items()}
            for point, suites in result["evaluations"].items()
        },
    }
