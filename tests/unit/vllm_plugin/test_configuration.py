"""The plug-in's reading of config.json, against the model's own class."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
from tiny_sambay import tiny_config

from sft.models import Phi4FlashConfig

Plugin = Callable[[str], ModuleType]
READ = ("layer_types", "sliding_window", "mamba_dt_rank", "vocab_size", "hidden_size", "tie_word_embeddings")
READ += ("bos_token_id", "eos_token_id", "pad_token_id", "layer_norm_eps", "mamba_d_state", "num_key_value_heads")
PUBLISHED = [512 if layer < 16 and layer % 2 else None for layer in range(32)]


@pytest.mark.parametrize(
    "told", [{}, {"sliding_window": PUBLISHED}, {"sliding_window": 64, "eos_token_id": [1, 2]}, tiny_config().to_dict()]
)
def test_it_reads_what_the_model_reads(plugin: Plugin, told: dict[str, Any]) -> None:
    found, wanted = plugin("configuration").Phi4FlashConfig(**dict(told)), Phi4FlashConfig(**dict(told))
    assert {name: getattr(found, name) for name in READ} == {name: getattr(wanted, name) for name in READ}
    assert [found.window(layer) for layer in range(found.num_hidden_layers)] == [
        wanted.window(layer) for layer in range(wanted.num_hidden_layers)
    ]


def test_it_reads_what_it_wrote(plugin: Plugin) -> None:
    module = plugin("configuration")
    first = module.Phi4FlashConfig(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
    assert module.Phi4FlashConfig(**first.to_dict()).to_dict() == first.to_dict()


def test_heads_of_the_cache_hold_a_pairs_values(plugin: Plugin) -> None:
    width = plugin("configuration").cache_head_width
    assert [width(head_dim) for head_dim in (8, 16, 20, 64, 128)] == [32, 32, 64, 128, 256]
    with pytest.raises(ValueError, match=r"heads are 129 wide.*up to 128"):
        width(129)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"num_hidden_layers": 30}, "num_hidden_layers 30, not a multiple of 4"),
        ({"num_attention_heads": 5}, "5 heads on 20 key-value heads"),
        ({"hidden_size": 0}, "hidden_size must be a whole number, not 0"),
        ({"mlp_bias": True}, "mlp_bias=True"),
        ({"mb_per_layer": 3}, "mb_per_layer 3"),
        ({"mamba_conv_bias": False}, "mamba_conv_bias=False"),
        ({"sliding_window": [None, 4, None, 8] * 8}, "layer 17 has a window|one width of at least 2 tokens"),
        ({"sliding_window": 1}, "one width of at least 2 tokens, not 1"),
        ({"layer_types": ["full_attention"]}, "1 entries for 32 layers"),
    ],
)
def test_what_is_no_sambay_is_refused(plugin: Plugin, told: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plugin("configuration").Phi4FlashConfig(**told)


def test_an_older_vllm_is_refused(plugin: Plugin) -> None:
    import importlib

    check = importlib.import_module("sambay_vllm").check_version if plugin("tensors") else None
    assert check is not None
    for version in ("0.32.0", "0.32.0+cpu", "0.40.1.dev3", "1.0", "dev"):
        check(version)
    with pytest.raises(RuntimeError, match=r"needs vLLM 0\.32 or newer, and 0\.31\.2 is installed"):
        check("0.31.2")
