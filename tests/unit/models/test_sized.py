"""Models of a size that is asked for, and transformers with as many parameters."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, Phi3ForCausalLM

from sft.models.sized import SHAPES, llama_of, parameters, random_sambay, shape_of, transformer_beside
from sft.utils.errors import UsageError


@pytest.mark.parametrize("size", [2_000_000, 7_500_000, 26_000_000, 120_000_000, 1_000_000_000])
def test_a_number_of_parameters_is_met(size: int) -> None:
    with torch.device("meta"):
        model = random_sambay(shape_of(size))
        assert parameters(model) == pytest.approx(size, rel=0.01)
        assert parameters(transformer_beside(model)) == pytest.approx(size, rel=0.01)


def test_beside_the_published_one_stands_phi_4_mini() -> None:
    with torch.device("meta"):
        other = transformer_beside(random_sambay(SHAPES["published"]))
    assert isinstance(other, Phi3ForCausalLM) and other.config.hidden_size == 3072


@pytest.mark.parametrize("kind", ["gpt2", "qwen2"])
def test_other_families_have_a_llama_too(kind: str) -> None:
    shape = {"n_embd": 64, "n_layer": 2, "n_head": 4} if kind == "gpt2" else {"hidden_size": 64, "num_hidden_layers": 2}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=500, **shape))
        assert parameters(transformer_beside(model)) == pytest.approx(parameters(model), rel=0.02)


def test_what_no_model_has_is_refused() -> None:
    for size in (1000, 10**12):
        with pytest.raises(UsageError, match=f"no shape is known for {size:,} parameters"):
            shape_of(size)
    with pytest.raises(UsageError, match="no Llama of width 160"):
        llama_of(1000, SHAPES["tiny"])
