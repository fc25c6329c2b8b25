"""A checkpoint's tensors reach the parameters of their names, all of them and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from safetensors import SafetensorError
from tiny_sambay import tiny_model
from torch import Tensor

Plugin = Callable[[str], ModuleType]
NORM = "model.final_layernorm.bias"


def weights(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def test_every_tensor_arrives(plugin: Plugin) -> None:
    given, model = weights(tiny_model(seed=1)), tiny_model(seed=2)
    assert plugin("loading").load(model, model.config, given.items()) == given.keys()
    assert all(torch.equal(value, given[name]) for name, value in weights(model).items())


def test_what_is_wrong_is_told(plugin: Plugin) -> None:
    model = tiny_model()
    given, load = weights(model), plugin("loading").load
    with pytest.raises(ValueError, match=f"sambay-vllm: the checkpoint lacks 1 tensor .{NORM}"):
        load(model, model.config, [(name, value) for name, value in given.items() if name != NORM])
    with pytest.raises(ValueError, match="holds 1 tensor that a SambaY model"):
        load(model, model.config, [*given.items(), ("model.norm.weight", given[NORM])])
    with pytest.raises(ValueError, match=r"shape \[31\], and config.json asks for \[32\]"):
        load(model, model.config, {**given, NORM: given[NORM][1:]}.items())


def test_a_file_that_ends_early_is_told(plugin: Plugin) -> None:
    model = tiny_model()

    def cut() -> Iterator[tuple[str, Tensor]]:
        yield NORM, weights(model)[NORM]
        raise SafetensorError("incomplete metadata")

    with pytest.raises(ValueError, match=r"cut short or damaged.*incomplete metadata"):
        plugin("loading").load(model, model.config, cut())
