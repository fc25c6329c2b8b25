"""Stages with and without suites answered while they train: `python live_worker.py FOLDER CASES`, by several ranks.

A case is an engine with its options and a precision, `zero3.lora-bf16`; its runs are in FOLDER/CASE/off and `on`.
With the option `llama` the model is the one in FOLDER/llama, which `write_llama` makes.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from engine_cases import MODEL, recipe_of, train_keys

EVERY = {"steps": 2}
SUITE = {
    "name": "words",
    "source": {"generate": {"family": "words", "rows": 3, "split": "test"}},
    "max_new_tokens": 6,
    "temperature": 1.0,
    "samples_per_problem": 2,
    "batch_size": 2,
}
STEPS = 4


def recipe(root: Path, case: str, **evaluate: Any) -> Any:
    """One stage of STEPS steps, with dropout where it has adapters."""
    from sft.recipe import Recipe

    words, precision = case.replace(".llama", "").split("-")
    keys = {"bf16": precision == "bf16", "max_steps": STEPS, **train_keys(words)}
    keys |= {"lora_dropout": 0.3} if keys.get("use_peft") else {}
    dumped = recipe_of(root, keys, suites=[SUITE]).model_dump()
    if ".llama" in case:
        dumped["model"] = {"model_name_or_path": str(root.parent.parent / "llama"), "dtype": "float32"}
    for stage in dumped["stages"]:
        stage["evaluate"] |= evaluate
    return Recipe.model_validate(dumped)


def write_llama(root: Path) -> None:
    """A model of another family than ours, random and small."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.tokenizers.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    shape = {name: value for name, value in MODEL.items() if name != "sliding_window"}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ends)).save_pretrained(root / "llama")
    tokenizer.save_pretrained(root / "llama")


def stopped(root: Path, case: str) -> None:
    """A run whose last process hears a signal in its first evaluation, and the same command again."""
    from sft import generate
    from sft.run.chain import run
    from sft.train.interrupt import Interrupted
    from sft.utils.distributed import rank, world_size

    original, made = generate.generate_batch, recipe(root / case / "stopped", case, every=EVERY)

    def signalled(*args: Any, on_done: Any, **more: Any) -> Any:
        def done(index: int, generation: Any) -> None:
            on_done(index, generation)
            if rank() == world_size() - 1:
                generate.generate_batch = original
                os.kill(os.getpid(), signal.SIGTERM)

        return original(*args, on_done=done, **more)

    generate.generate_batch = signalled
    try:
        run(made)
    except Interrupted as error:
        (root / case / f"stopped-{rank()}.txt").write_text(str(error), encoding="utf-8")
    generate.generate_batch = original
    run(made)


def main() -> None:
    from sft.run.chain import run
    from sft.utils.distributed import is_main

    root = Path(sys.argv[1])
    for case in sys.argv[2].split(","):
        run(recipe(root / case / "off", case))
        result = run(recipe(root / case / "on", case, every=EVERY))
        if is_main():
            (root / case / "result.json").write_text(json.dumps(result["evaluations"]), encoding="utf-8")
    stopped(root, sys.argv[2].split(",")[0])


if __name__ == "__main__":
    main()
