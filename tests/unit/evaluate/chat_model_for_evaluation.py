"""A tiny Qwen3 with a tokenizer of single characters: speaks nonsense, digits among it, but the same one every time.

Run as a script it evaluates a suite; the tests kill it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

CHARACTERS = "0123456789 +-=?.abcdefghijklmnopqrstuvwxyz#{}\\"
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def make_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>", "<|unknown|>"]
    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unknown|>",
        additional_special_tokens=special[2:5],
        chat_template=TEMPLATE,
    )


def make_model(vocabulary: int) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        eos_token_id=1,
    )
    return Qwen3ForCausalLM(config).eval()


def make_section(data: Path, **changes: Any) -> Any:
    from sft.recipe.schema import EvaluateSection, Source, SuiteSection

    settings = {
        "name": "sums",
        "source": Source(path=str(data)),
        "prompt_template": "add. {prompt}",
        "max_new_tokens": 40,
        "temperature": 1.0,
        "samples_per_problem": 2,
        "batch_size": 4,
        "seed": 3,
    }
    return EvaluateSection(suites=[SuiteSection(**{**settings, **changes})])


def write_problems(path: Path, count: int = 24) -> Path:
    """Sums below 10, so that a random digit is right now and then."""
    rows = [
        {"prompt": f"{i % 5} + {i % 4}", "answer": str(i % 5 + i % 4), "family": "ab"[i % 2], "steps": 3 + i % 3}
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


if __name__ == "__main__":
    import time

    from sft.evaluate.runner import evaluate

    tokenizer = make_tokenizer()

    def slowly(suite: str, done: int, total: int, right: int) -> None:
        # So that the kill meets a run under way.
        time.sleep(0.1)

    evaluate(
        make_model(len(tokenizer)),
        tokenizer,
        make_section(Path(sys.argv[1])),
        prompt_defaults=None,
        out_dir=sys.argv[2],
        point="start",
        progress=slowly,
    )
