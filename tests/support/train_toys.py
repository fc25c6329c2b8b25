"""Tiny models, tokenizers, recipes and prepared rows for tests of training."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sft.recipe.paths import RunPaths
from sft.recipe.schema import Recipe
from sft.recipe.train_keys import EVALUATION_KEYS

VOCABULARY = 96


def tiny_tokenizer() -> Any:
    """A word-level tokenizer of VOCABULARY words, made in memory."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": 0, "<end>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", unk_token="<unk>")


def tiny_qwen(seed: int = 0, **overrides: Any) -> Any:
    """A two-layer Qwen3 of about 20 thousand parameters, on its sdpa attention."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**{**config, **overrides}))


def tiny_sambay(seed: int = 0, **overrides: Any) -> Any:
    """An eight-layer SambaY of about 100 thousand parameters: every kind of layer, a window of 16."""
    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 16,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 1,
    }
    torch.manual_seed(seed)
    return Phi4FlashForCausalLM(Phi4FlashConfig(**{**config, **overrides}))


@dataclass
class ToyPrepared:
    """What sft.data.prepare.PreparedStage offers to training."""

    dataset: Any
    manifest: dict[str, Any] = field(default_factory=lambda: {"key": "toy"})
    path: Path = Path("toy")
    validation: Any = None


def toy_rows(rows: int, *, packed: bool, seed: int = 0, longest: int = 20, held_out: int = 0) -> ToyPrepared:
    """Prepared rows of documents that count upwards, so that a model learns them; the first third is the prompt.

    `held_out`: rows of the same kind beside them.
    """
    from datasets import Dataset, Features, List, Value

    rng = np.random.default_rng(seed)
    made = []
    for index in range(rows):
        lengths = rng.integers(3, longest, size=rng.integers(2, 5) if packed else 1)
        documents = [(3 + (rng.integers(90) + np.arange(n)) % (VOCABULARY - 3)) for n in lengths]
        masks = [(np.arange(n) >= n // 3).astype(int) for n in lengths]
        made.append(
            {
                "input_ids": np.concatenate(documents).tolist(),
                "assistant_masks": np.concatenate(masks).tolist(),
                "seq_lengths": lengths.tolist(),
                "document_ids": [f"{index}-{i}" for i in range(len(lengths))],
            }
        )
    features = Features(
        {
            "input_ids": List(Value("int32")),
            "assistant_masks": List(Value("uint8")),
            "seq_lengths": List(Value("int32")),
            "document_ids": List(Value("string")),
        }
    )
    held = None
    if held_out:
        numbers = {"key": "held", "documents": held_out, "tokens": 0, "supervised_tokens": 0}
        held = toy_rows(held_out, packed=packed, seed=seed + 1, longest=longest)
        held.manifest.update(numbers)
    return ToyPrepared(Dataset.from_list(made, features=features), validation=held)


def toy_recipe(root: Path, *trains: dict[str, Any], stage: dict[str, Any] | None = None, **overrides: Any) -> Recipe:
    """A recipe with one stage (`one`, `two`, ...) per dict of `train` keys; its data section is never read.

    `stage`: keys of the stages beside these.
    """
    names = ["one", "two", "three", "four"]
    held = {"validation": {"size": 1}}
    base = {"learning_rate": 1e-2, "lr_scheduler_type": "cosine", "use_cpu": True, "max_length": 64}
    return Recipe.model_validate(
        {
            "name": "toy",
            "output_dir": str(root),
            "model": {"model_name_or_path": str(root / "start"), "dtype": "float32"},
            "stages": [
                {
                    "name": name,
                    "data": {"sources": [{"path": "toy.jsonl"}], **(held if EVALUATION_KEYS & train.keys() else {})},
                    "train": {**base, **train},
                    **(stage or {}),
                }
                for name, train in zip(names, trains, strict=False)
            ],
            **overrides,
        }
    )


def train_toy(
    root: Path,
    train: dict[str, Any],
    *,
    model: Any = None,
    prepared: Any = None,
    stage: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """Train a one-stage toy recipe in `root`; returns (manifest, paths). `stage`: keys beside its `train`."""
    from sft.run.identity import settled_parts
    from sft.train.stage import train_stage

    recipe = toy_recipe(root, train, stage=stage)
    paths = RunPaths(recipe)
    model = tiny_qwen() if model is None else model
    prepared = prepared or toy_rows(16, packed=bool(train.get("packing")))
    manifest = train_stage(
        recipe,
        recipe.stages[0],
        model=model,
        tokenizer=tiny_tokenizer(),
        prepared=prepared,
        paths=paths,
        parts={**settled_parts(paths, recipe.stages[0]), "data": prepared.manifest["key"]},
        base={"kind": "start", "content": weights_hash(model)} if train.get("use_peft") else None,
        **options,
    )
    return manifest, paths


def weights_hash(model: Any) -> str:
    """A hash of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.float().numpy().tobytes())
    return digest.hexdigest()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl."""
    import json

    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder's safetensors files."""
    from safetensors.torch import load_file

    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def signal_at(monkeypatch: Any, step: int, signum: int = signal.SIGTERM) -> None:
    """Send this process a signal at the end of `step`; monkeypatch: pytest's."""
    from sft.train.callbacks import StopOnSignal

    original = StopOnSignal.on_step_end

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == step:
            os.kill(os.getpid(), signum)
        return original(self, args, state, control, **kwargs)

    monkeypatch.setattr(StopOnSignal, "on_step_end", on_step_end)
