"""The gradient audit refuses runs that would leave trainable tensors as they are."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from train_toys import tiny_qwen, tiny_sambay, toy_recipe, train_toy

from sft.models.lora import attach_adapters, lora_settings
from sft.train.audit import GradientAudit
from sft.utils.errors import UserError


def test_a_dead_parameter_is_named_and_the_run_refused(tmp_path):
    model = tiny_qwen()
    model.model.forgotten = nn.Parameter(torch.ones(3))
    with pytest.raises(UserError, match=r"1 of \d+ trainable tensors got no gradient .*: model\.forgotten\. Freeze"):
        train_toy(tmp_path, {"max_steps": 2}, model=model)
    assert not (tmp_path / "stages/one/manifest.json").exists()


def test_a_dead_adapter_is_named(tmp_path):
    """An adapter whose output is thrown away, as in the published code's cross-attention layers."""
    settings = lora_settings(toy_recipe(tmp_path, {"use_peft": True}).stages[0])
    model = attach_adapters(tiny_qwen(), settings, seed=0)
    projection = model.base_model.model.model.layers[1].self_attn.v_proj
    projection.register_forward_hook(lambda module, args, output: output.detach())
    with pytest.raises(UserError, match=r"2 of \d+ .*layers\.1\.self_attn\.v_proj\.lora_A.*v_proj\.lora_B"):
        train_toy(tmp_path, {"max_steps": 2, "use_peft": True}, model=model)


@pytest.mark.parametrize("extra", [{}, {"gradient_checkpointing": True}], ids=["plain", "checkpointing"])
def test_all_default_adapters_of_sambay_are_live(tmp_path, extra):
    """Their default targets reach all five kinds of layer; the audit inside the run would refuse a dead one."""
    model = tiny_sambay()
    manifest, _ = train_toy(tmp_path, {"max_steps": 1, "use_peft": True, **extra}, model=model)
    assert manifest["steps"] == 1
    adapted = {name.split(".lora_")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert len(adapted) > 20


def test_hooks_are_gone_afterwards():
    model = nn.Linear(2, 2)
    audit = GradientAudit(model)
    model(torch.ones(1, 2)).sum().backward()
    audit.finish()
    assert not model.weight._backward_hooks
