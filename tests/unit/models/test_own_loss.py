"""A loss that a model's own can't make way for is told before anything is loaded, at its line of the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from train_toys import tiny_qwen, tiny_sambay, toy_recipe

from sft.models.own_loss import loss_problems, own_loss

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def gemma(**changes: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "head_dim": 8, **changes}))


def granite(**changes: Any) -> Any:
    from transformers import GraniteConfig, GraniteForCausalLM

    return GraniteForCausalLM(GraniteConfig(**{**SIZES, **changes}))


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, head_dim=8, **experts))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (gemma, "Gemma2ForCausalLM changes its logits (final_logit_softcapping)"),
        (lambda: granite(logits_scaling=8.0), "GraniteForCausalLM changes its logits (logits_scaling)"),
        (mixture, "Qwen3MoeForCausalLM adds a loss of its experts"),
        (lambda: gemma(final_logit_softcapping=None), None),
        (granite, None),
        (tiny_qwen, None),
        (tiny_sambay, None),
    ],
    ids=["cap", "scale", "experts", "no cap", "no scale", "qwen3", "sambay"],
)
def test_the_structure_tells(make: Any, why: str | None) -> None:
    assert own_loss(make()) == why


@pytest.mark.parametrize(("key", "value"), [("loss", {"normalize": "sample"}), ("distill", {"weight": 0.5})])
def test_each_stage_is_told(tmp_path: Path, key: str, value: dict[str, Any]) -> None:
    gemma().save_pretrained(tmp_path / "start")
    problems = list(loss_problems(toy_recipe(tmp_path, {}, {key: value}, {"loss": {"type": "nll"}})))
    assert [problem.loc for problem in problems] == [("stages", 1, "train", key)]
    assert problems[0].message.endswith(f"so its own loss is all that it can be trained with: leave {key} out")


def test_an_end_at_an_accuracy_that_nobody_knows_is_told(tmp_path: Path) -> None:
    gemma().save_pretrained(tmp_path / "start")
    (problem,) = loss_problems(toy_recipe(tmp_path, {}, stage={"stop_when": {"token_accuracy": 0.9}}))
    assert problem.loc == ("stages", 0, "stop_when") and problem.message.endswith("leave stop_when out")
