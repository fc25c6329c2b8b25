"""Traps that the published code and ordinary trainers fall into when they train this model."""

from typing import Any

import pytest
import torch
from tiny_sambay import tiny_model


def batch(length=50, seed=0):
    ids = torch.randint(1, 96, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids, "cu_seq_lens_q": torch.tensor([0, 20, length], dtype=torch.int32)}


def gradients(model, **changes):
    model.zero_grad()
    model(**{**batch(), **changes}).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_checkpointing_keeps_every_gradient():
    """Reentrant checkpointing silently loses what layer L/2+1's keys and values learn."""
    model = tiny_model(seed=1).train()
    plain = gradients(model)
    model.gradient_checkpointing_enable()
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    found = gradients(model)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        assert gradient.any(), name
        assert torch.equal(found[name], gradient), name


def test_reentrant_checkpointing_is_refused():
    with pytest.raises(ValueError, match="use_reentrant"):
        tiny_model().gradient_checkpointing_enable({"use_reentrant": True})


def test_the_end_of_text_row_learns_though_it_is_also_pad():
    """nn.Embedding(padding_idx) would keep the row of pad = end-of-text from learning what it means as an input."""
    model = tiny_model().train()
    ids = torch.tensor([[5, 0, 7, 8]])
    embeds = model.model.embed_tokens(ids)
    embeds.retain_grad()
    model(inputs_embeds=embeds, labels=torch.tensor([[-100, -100, 7, 8]])).loss.backward()
    assert embeds.grad[0, 1].any()
    assert model.model.embed_tokens.weight.grad[0].any()
    assert model.model.embed_tokens.padding_idx is None


def test_the_end_token_is_trained_though_it_is_also_pad():
    """The loss reads labels, never whether a token equals pad."""
    model = tiny_model().eval()
    ids = torch.tensor([[5, 6, 7, 0]])
    labels = torch.tensor([[-100, -100, -100, 0]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=labels, use_cache=False).loss
        logits = model(input_ids=ids, use_cache=False).logits
    assert torch.isclose(loss, torch.nn.functional.cross_entropy(logits[0, 2:3], torch.tensor([0])), atol=1e-6)


def test_every_lora_adapter_is_live():
    """In the published code 34 of 146 adapters never get a gradient: their weights are read around the adapter."""
    from peft import LoraConfig, get_peft_model

    from sft.models.load import lora_target_modules

    model = tiny_model()
    targets = lora_target_modules(model.config)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights=False)).train()
    adapters = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert len(adapters) == 2 * (3 * 4 + 2 * 1 + 4 * 2 + 8 * 2)  # Mamba, GMU, attention, MLP; A and B each
    adapted(**batch()).loss.backward()
    dead = [name for name, p in adapted.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert dead == []
    ids = batch()["input_ids"]
    with torch.no_grad():
        before = adapted.eval()(input_ids=ids, use_cache=False).logits
        after = adapted.merge_and_unload()(input_ids=ids, use_cache=False).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("way", ["autocast", "bf16 weights"])
def test_half_precision_stays_near_full(way):
    """fp32 masters under autocast, and weights held in bf16 with A_log and lambda in fp32, as published."""
    model = tiny_model(seed=2).train()
    expected = gradients(model)
    if way == "autocast":
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = gradients(model)
    else:
        names = model._keep_in_fp32_modules_strict
        for name, parameter in model.named_parameters():
            if not any(key in name for key in names):
                parameter.data = parameter.data.bfloat16()
        found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        cosine = torch.nn.functional.cosine_similarity(found[name].float().flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.95, (name, cosine)


def test_the_residual_stream_is_fp32_from_the_first_layer_on():
    model = tiny_model(dtype=torch.bfloat16)
    seen = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: seen.append(out[0].dtype)) for layer in model.model.layers]
    with torch.no_grad():
        model(input_ids=batch()["input_ids"], use_cache=False)
    for hook in hooks:
        hook.remove()
    assert set(seen) == {torch.float32}


def test_the_loss_does_not_depend_on_how_a_batch_is_split():
    model = tiny_model().train()
    ids = torch.randint(1, 96, (4, 30))
    labels = ids.clone()
    labels[0, :20] = labels[2, :5] = -100
    count = (labels[:, 1:] != -100).sum()
    whole = model(input_ids=ids, labels=labels).loss
    parts = sum(
        model(input_ids=ids[i : i + 1], labels=labels[i : i + 1], num_items_in_batch=count).loss for i in range(4)
    )
    assert torch.isclose(whole, parts, rtol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
def test_norms_write_what_the_next_product_reads(autocast: bool) -> None:
    """Nothing is left to cast before a layer's products; the residual stream and the loss's input stay float32."""
    model, seen = tiny_model().train(), {}

    def see(name: str) -> Any:
        def hook(_module: Any, args: tuple[Any, ...]) -> None:
            seen[name] = args[0].dtype

        return hook

    for name, module in model.named_modules():
        if name.endswith((".in_proj", ".Wqkv", ".fc1", "_layernorm", "lm_head")):
            module.register_forward_pre_hook(see(name))
    ids = torch.arange(1, 13)[None]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(input_ids=ids, labels=ids).loss.backward()
    narrow = torch.bfloat16 if autocast else torch.float32
    assert len(seen) > 8
    for name, dtype in seen.items():
        assert dtype == (torch.float32 if "norm" in name or name == "lm_head" else narrow), name
