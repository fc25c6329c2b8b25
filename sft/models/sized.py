"""Models of a given size with random weights: a SambaY, and a transformer of as many parameters to stand beside it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from sft.models.sambay import Phi4FlashConfig, Phi4FlashForCausalLM
from sft.utils.errors import UsageError

_IDS = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SMALL: dict[str, Any] = {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 8} | _IDS
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 1024, "sliding_window": 512}
TINY = SMALL | {"vocab_size": 400, "hidden_size": 160, "intermediate_size": 256, "sliding_window": 16}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 4}
SHAPES: dict[str, dict[str, Any]] = {"tiny": TINY, "small": SMALL, "published": {}}
"""By name: the recipe tiny's, one of 9.6 million parameters, and that of Phi-4-mini-flash-reasoning."""
PHI_4_MINI: dict[str, Any] = {
    "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32,
    "num_attention_heads": 24, "num_key_value_heads": 8, "max_position_embeddings": 131072,
    "tie_word_embeddings": True, "attn_implementation": "sdpa",
} | _IDS  # fmt: skip
"""The transformer that the published model was made to be compared with (arXiv 2507.06607)."""
_CLOSE = 0.01
_LARGE = 50_000_000  # from here on the vocabulary is that of a language


def parameters(model: torch.nn.Module) -> int:
    """How many a model has, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_sambay(shape: Mapping[str, Any]) -> Phi4FlashForCausalLM:
    """A SambaY of this configuration, its weights drawn with seed 0."""
    torch.manual_seed(0)
    return Phi4FlashForCausalLM(Phi4FlashConfig(**shape))


def shape_of(size: str | int) -> dict[str, Any]:
    """The configuration of a name of SHAPES, or of a SambaY of about so many parameters.

    Width and depth grow together as from SMALL to the published model; the MLP's width makes up the rest.

    Raises:
        UsageError: fewer or more parameters than such a model has.
    """
    if isinstance(size, str):
        return SHAPES[size]
    sizes = [_shape(width, size) for width in range(128, 8193, 128)]
    candidates = [shape for shape in sizes if shape["hidden_size"] // shape["num_attention_heads"] % 16 == 0]
    for shape, wider in pairwise(candidates):
        have = _count(partial(random_sambay, shape))
        if size < have:
            break
        if size < _count(partial(random_sambay, wider)):
            more = round((size - have) / _mlp_column(shape))
            return shape | {"intermediate_size": shape["intermediate_size"] + more}
    raise UsageError(f"no shape is known for {size:,} parameters: a model has at least a million, at most 30 billion")


def _shape(width: int, size: int) -> dict[str, Any]:
    """Of the smallest model of this width."""
    heads = 4 * max(1, round(width / 256))
    heads = heads if width % heads == 0 else 4
    shape = {"hidden_size": width, "num_hidden_layers": max(8, 4 * round(width / 320)), "intermediate_size": 2 * width}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads // 2}
    return SMALL | shape | {"vocab_size": 4096 if size < _LARGE else 32768}


def llama_of(wanted: int, shape: Mapping[str, Any]) -> LlamaForCausalLM:
    """A Llama with the width, depth and heads of `shape` whose MLP is as wide as brings it to `wanted` parameters.

    Raises:
        UsageError: where no MLP is so narrow.
    """
    kept = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", *_IDS)
    options: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 131072}
    options |= {key: shape[key] for key in kept}

    def build(intermediate: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=intermediate))

    narrow = 8
    width = narrow + round((wanted - _count(lambda: build(narrow))) / _mlp_column(options))
    if width < 1:
        raise UsageError(f"no Llama of width {shape['hidden_size']} has as few parameters as {wanted:,}")
    return build(width)


def transformer_beside(model: Any) -> LlamaForCausalLM | Phi3ForCausalLM:
    """A transformer with as many parameters as `model`: of Phi-4-mini's shape where that has as many, else a Llama."""
    wanted = parameters(model)

    def phi() -> Phi3ForCausalLM:
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**PHI_4_MINI))

    if abs(_count(phi) / wanted - 1) < _CLOSE:
        return phi()
    return llama_of(wanted, {**model.config.get_text_config().to_dict(), **_IDS})


def _mlp_column(shape: Mapping[str, Any]) -> int:
    """The parameters by which a model grows when its MLPs get wider by one."""
    return int(shape["num_hidden_layers"] * 3 * shape["hidden_size"])


def _count(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return parameters(build())
