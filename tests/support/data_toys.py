"""What the data tests share with the processes they start; run as a script, it prepares one stage and prints its key.

python tests/support/data_toys.py SOURCE OUT MAX_LENGTH PACKING(0|1)
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

CHAT_TOKENS = ("<|assistant|>", "<|end|>", "<|user|>", "<|system|>")
TOOL_TOKENS = ("<|tool|>", "<|/tool|>")


def byte_tokenizer() -> Any:
    """A fast tokenizer without merges: one token a byte, plus chat tokens like Phi-4-mini's (pad = eos)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from sft.tokenizers.templates import PUBLISHED_TEMPLATE

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    backend.add_special_tokens([AddedToken(t, rstrip=True, special=True, normalized=False) for t in CHAT_TOKENS])
    backend.add_tokens([AddedToken(t, rstrip=True, special=False, normalized=False) for t in TOOL_TOKENS])
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=end, eos_token=end, pad_token=end)
    tokenizer.chat_template = PUBLISHED_TEMPLATE
    return tokenizer


def stage_of(sources: list[dict[str, Any]], out: Path, train: dict[str, Any], data: dict[str, Any]) -> Any:
    """A recipe with one stage over `sources`."""
    from sft.recipe.schema import Recipe

    return Recipe.model_validate(
        {
            "name": "test",
            "output_dir": str(out),
            "model": {"tokenizer": "toy", "config": {}},
            "stages": [{"name": "sft", "data": {"sources": sources, **data}, "train": train}],
        }
    )


def main() -> None:
    """Prepare the stage that the command line describes."""
    from sft.data.prepare import prepare_stage

    source, out, max_length, packing = sys.argv[1:]
    train = {"max_length": int(max_length), "packing": packing == "1"}
    recipe = stage_of([{"path": source}], Path(out), train, {"max_bad_fraction": 1.0})
    tokenizer = byte_tokenizer()
    print("ready", flush=True)
    prepared = prepare_stage(recipe, recipe.stages[0], tokenizer)
    print(prepared.manifest["key"], flush=True)


if __name__ == "__main__":
    main()
