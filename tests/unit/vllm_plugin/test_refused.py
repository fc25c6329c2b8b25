"""Options that a SambaY model can't be run with are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

Plugin = Callable[[str], ModuleType]


def asked(**changes: Any) -> SimpleNamespace:
    """vLLM's configuration as far as it is read; a change is "cache_config.cache_dtype" with __ for the dot."""
    told = SimpleNamespace(
        parallel_config=SimpleNamespace(tensor_parallel_size=1, pipeline_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        quant_config=None,
        lora_config=None,
    )
    for name, value in changes.items():
        *path, last = name.split("__")
        setattr(getattr(told, path[0]) if path else told, last, value)
    return told


def test_the_usual_is_fine(plugin: Plugin) -> None:
    assert plugin("refused").unsupported(asked()) is None


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"parallel_config__tensor_parallel_size": 2}, "tensor_parallel_size=2"),
        ({"parallel_config__pipeline_parallel_size": 4}, "pipeline_parallel_size=4"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"quant_config": object()}, "quantization"),
        ({"lora_config": object()}, "enable_lora"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "kv_cache_dtype=fp8_e4m3"),
    ],
)
def test_others_are_refused(plugin: Plugin, change: dict[str, Any], name: str) -> None:
    told = plugin("refused").unsupported(asked(**change))
    assert told is not None and name in told and "not supported" in told
