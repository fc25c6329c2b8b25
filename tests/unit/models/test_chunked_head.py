"""Other models' loss in chunks equals their own, in value and gradients; where theirs is another, it is kept."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from train_toys import tiny_qwen, tiny_sambay

from sft.models.chunked_head import chunk_loss, unchunk_loss
from sft.train.collator import PackedCollator, PaddedCollator
from sft.train.probe import chunk_own_loss, loss_scaling

SIZES: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1,
}  # fmt: skip


def llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes}))


def gemma(**changes: Any) -> Any:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(2)
    return Gemma2ForCausalLM(Gemma2Config(**{**SIZES, "query_pre_attn_scalar": 8, **changes}))


def cohere() -> Any:
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logit_scale=0.5))


def mixture() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "output_router_logits": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **experts))


def with_bias() -> Any:
    model = llama()
    model.lm_head = torch.nn.Linear(32, 96)
    return model


def with_a_loss_of_its_own() -> Any:
    model = llama()
    own = model.loss_function
    model.loss_function = lambda *args, **kwargs: own(*args, **kwargs) * 1.01
    return model


def adapted(make: Callable[[], Any], **settings: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    settings = {"target_modules": ["q_proj", "down_proj"], **settings}
    return get_peft_model(make(), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **settings))


def batch(collator: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in (9, 30, 14):
        ids = torch.randint(2, 96, (length,), generator=generator).numpy()
        rows.append({"input_ids": ids, "assistant_masks": [i % 3 > 0 for i in range(length)], "seq_lengths": [length]})
    inputs = collator(rows)
    return {key: value for key, value in inputs.items() if not key.startswith("num_")} | {"use_cache": False}


def step(model: Any, inputs: dict[str, Any], count: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model.train()(**inputs, num_items_in_batch=torch.tensor(count)).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("collator", [PackedCollator(), PaddedCollator()], ids=["packed", "padded"])
@pytest.mark.parametrize(
    "make",
    [
        tiny_qwen,
        llama,
        lambda: gemma(final_logit_softcapping=None),
        lambda: adapted(llama),
        lambda: adapted(tiny_qwen),
    ],
    ids=["qwen3", "llama", "gemma2 without a cap", "llama with adapters", "qwen3 with adapters"],
)
def test_loss_and_gradients_are_the_models_own(make: Callable[[], Any], collator: Any) -> None:
    model, inputs = make(), batch(collator)
    own_loss, own_gradients = step(model, inputs, 17)
    assert chunk_own_loss(model.eval(), collator)
    loss, gradients = step(model, inputs, 17)
    assert torch.isclose(loss, own_loss, rtol=1e-5)
    assert gradients.keys() == own_gradients.keys()
    for name, gradient in own_gradients.items():
        assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max() + 1e-8, name


@pytest.mark.parametrize(
    "make",
    [
        gemma,
        cohere,
        mixture,
        with_bias,
        with_a_loss_of_its_own,
        tiny_sambay,
        lambda: adapted(llama, modules_to_save=["lm_head"]),
        lambda: adapted(llama, target_modules=["q_proj", "lm_head"]),
    ],
    ids=["soft cap", "scale", "experts", "bias", "own loss", "sambay", "saved head", "adapted head"],
)
def test_a_loss_that_is_more_is_kept(make: Callable[[], Any]) -> None:
    model = make()
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    assert not chunk_own_loss(model, PackedCollator())
    assert "forward" not in vars(base) and "forward" not in vars(base.get_output_embeddings())


def test_the_logits_are_never_made_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = llama(), batch(PackedCollator())
    chunk_own_loss(model, PackedCollator())
    monkeypatch.setattr(torch.nn.Linear, "forward", checked(torch.nn.Linear.forward))
    output = model.train()(**inputs)
    assert getattr(output, "logits", None) is None
    assert torch.isfinite(output.loss)


def checked(forward: Any) -> Any:
    def run(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        assert self.out_features != 96, "the head was run on every token"
        return forward(self, hidden)

    return run


def test_without_labels_and_afterwards_the_model_is_as_before() -> None:
    model, inputs = llama().eval(), batch(PackedCollator())
    own = model(**inputs)
    assert chunk_own_loss(model, PackedCollator()) and not chunk_loss(model, inputs)
    unlabelled = {key: value for key, value in inputs.items() if key != "labels"}
    assert torch.equal(model(**unlabelled).logits, own.logits)
    asked = {"max_new_tokens": 4, "do_sample": False}
    text = model.generate(inputs["input_ids"][:, :5], **asked)
    assert inspect.signature(model.forward) == inspect.signature(type(model).forward.__get__(model))
    unchunk_loss(model)
    assert torch.equal(model(**inputs).logits, own.logits)
    assert torch.equal(model.generate(inputs["input_ids"][:, :5], **asked), text)
    assert not {"forward"} & (set(vars(model)) | set(vars(model.lm_head)))


def test_the_scaling_is_a_sum_however_the_loss_is_made() -> None:
    model = tiny_qwen()
    assert chunk_own_loss(model, PackedCollator())
    assert loss_scaling(model, PackedCollator()) == "sum"
