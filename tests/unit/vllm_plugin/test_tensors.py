"""The tensors that the plug-in asks a checkpoint for, against the model's own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from tiny_sambay import tiny_config

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

Plugin = Callable[[str], ModuleType]


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 4, "num_attention_heads": 4}, {"mamba_d_conv": 3}])
def test_they_are_those_of_the_model(plugin: Plugin, changes: dict[str, int]) -> None:
    config = tiny_config(**changes)
    with torch.device("meta"):
        model = Phi4FlashForCausalLM(config)
    own = {name: tuple(value.shape) for name, value in model.named_parameters() if name != "lm_head.weight"}
    assert plugin("tensors").expected_shapes(config) == own


def test_the_published_model_has_434(plugin: Plugin) -> None:
    shapes = plugin("tensors").expected_shapes(Phi4FlashConfig())
    assert len(shapes) == 434
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 3_852_562_944


def test_an_untied_head_is_asked_for(plugin: Plugin) -> None:
    shapes = plugin("tensors").expected_shapes(Phi4FlashConfig(tie_word_embeddings=False))
    assert shapes["lm_head.weight"] == (200064, 2560) and len(shapes) == 435


def test_what_is_wrong_is_one_sentence(plugin: Plugin) -> None:
    module = plugin("tensors")
    assert (
        module.wrong_shape("a", (2, 3), (2, 3)) is None and module.missing(()) is None and module.left_over(()) is None
    )
    assert module.wrong_shape("model.norm", (2,), (3,)) == (
        "tensor model.norm has shape [2], and config.json asks for [3]: the weights and config.json aren't of the same "
        "model"
    )
    assert module.missing(["b", "a"]) == (
        "the checkpoint lacks 2 tensors (a, b): a weights file is missing; copy the whole folder again"
    )
    told = module.left_over(["e", "d", "c", "b"])
    assert "4 tensors" in told and "(b, c, d, ...)" in told
    assert "adapter" in module.left_over(["model.layers.0.attn.in_proj.lora_A.weight"])
