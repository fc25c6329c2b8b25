"""Causal language models of several families, small and random, each with a tokenizer as its family has it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
_GROUPED = {**_SHAPE, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Family:
    """What transformers calls it, its control tokens (the first ends a text), its chat template and shape."""

    kind: str
    tokens: tuple[str, ...]
    template: str
    shape: dict[str, Any] = field(default_factory=lambda: _GROUPED)


_LLAMA = ("<|end_of_text|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", "<|system|>")
FAMILIES = (
    Family("llama", _LLAMA, "llama3"),
    Family("qwen2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "qwen2_5"),
    Family("gemma2", ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), "gemma", {**_GROUPED, "head_dim": 8}),
    Family("phi3", _PHI, "phi3", {**_GROUPED, "pad_token_id": 0}),
    # Base models whose vocabulary has no token for a turn: the template's words are spelled out.
    Family("gpt2", ("<|endoftext|>",), "chatml", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 2048}),
    Family("gpt_neox", ("<|endoftext|>",), "chatml", _SHAPE),
)


def write_model(folder: Path, family: Family) -> Path:
    """A checkpoint folder with random weights and a byte tokenizer that has no chat template."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = _tokenizer(family)
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    values = {"pad_token_id": tokenizer.eos_token_id, **family.shape, **ends, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family.kind, **values)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_chats(path: Path, rows: int) -> Path:
    """One conversation a line."""
    lines = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def _tokenizer(family: Family) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in family.tokens])
    begin = next((token for token in family.tokens if "b" in token and token.strip("<|>").startswith("b")), None)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=family.tokens[0], bos_token=begin or family.tokens[0]
    )
