"""Models of a given size with random weights: a SambaY, and a transformer of as many parameters to stand beside it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
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
_KEPT = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
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
    shapes = [_shape(width, size) for width in range(128, 8193, 128)]
    shapes = [shape for shape in shapes if shape["hidden_size"] // shape["num_attention_heads"] % 16 == 0]
    place = bisect_right(shapes, size, key=lambda shape: _count(partial(random_sambay, shape)))
    if place in (0, len(shapes)):
        raise UsageError(
            f"no shape is known for {size:,} parameters: a model has at least 2 million, at most 30 billion"
        )
    shape = shapes[place - 1]
    more = round((size - _count(partial(random_sambay, shape))) / _mlp_column(shape))
    return shape | {"intermediate_size": shape["intermediate_size"] + more}


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
    options: dict[str, Any] = {"tie_word_embeddings": True, "max_position_embeddings": 131072}
    options |= {key: shape[key] for key in (*_KEPT, *_IDS)}

    def build(intermediate: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**options, intermediate_size=intermediate))

    narrow = 8
    width = narrow + round((wanted - _count(lambda: build(narrow))) / _mlp_column(options))
    if width < 1:
        raise UsageError(f"no Llama of width {shape['hidden_size']} has as few parameters as {wanted:,}")
    return build(width)


def transformer_beside(model: Any) -> LlamaForCausalLM | Phi3ForCausalLM:
    """A transformer with as many parameters as `model`: of Phi-4-mini's shape where that has as many, else a Llama.

    Raises:
        UsageError: a configuration that doesn't tell its shape by the usual names.
    """
    wanted = parameters(model)

    def phi() -> Phi3ForCausalLM:
        torch.manual_seed(0)
        return Phi3ForCausalLM(Phi3Config(**PHI_4_MINI))

    if abs(_count(phi) / wanted - 1) < _CLOSE:
        return phi()
    config = model.config.get_text_config()
    shape = _IDS | {name: getattr(config, name, None) for name in _KEPT}
    shape["num_key_value_heads"] = shape["num_key_value_heads"] or shape["num_attention_heads"]
    if missing := [name for name, value in shape.items() if value is None]:
        raise UsageError(f"no Llama can be made of {config.model_type}'s size: its configuration has no {missing[0]}")
    return llama_of(wanted, shape)


def _mlp_column(shape: Mapping[str, Any]) -> int:
    """The parameters by which a model grows when its MLPs get wider by one."""
    return int(shape["num_hidden_layers"] * 3 * shape["hidden_size"])


def _count(build: Callable[[], torch.nn.Module]) -> int:
    with torch.device("meta"):
        return parameters(build())
