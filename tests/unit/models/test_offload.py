"""Every parameter is read in its own module's forward: what accelerate's offloading and spreading rely on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from tiny_sambay import tiny_config, tiny_model

from sft.models import Phi4FlashForCausalLM

IDS = torch.randint(1, 96, (2, 30), generator=torch.Generator().manual_seed(3))


def offloaded(how: str, folder: Any) -> Phi4FlashForCausalLM:
    model = tiny_model(seed=5)
    if how == "cpu":
        return cpu_offload(model, execution_device=torch.device("cpu"))
    if how == "disk":
        return disk_offload(model, folder, execution_device=torch.device("cpu"))
    layers = {f"model.layers.{i}": "cpu" if i % 2 else "disk" for i in range(8)}
    rest = {"model.embed_tokens": "cpu", "model.final_layernorm": "disk", "lm_head": "cpu"}
    return dispatch_model(model, {**layers, **rest}, main_device="cpu", offload_dir=folder, force_hooks=True)


@pytest.mark.parametrize("how", ["cpu", "disk", "dispatched"])
def test_offloaded_weights_give_the_same_logits_and_text(how: str, tmp_path: Any) -> None:
    plain, model = tiny_model(seed=5), offloaded(how, tmp_path)
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    borders = torch.tensor([0, 11, 60], dtype=torch.int32)
    with torch.no_grad():
        for inputs in (
            {"input_ids": IDS, "attention_mask": mask},
            {"input_ids": IDS.reshape(1, 60), "cu_seq_lens_q": borders, "labels": IDS.reshape(1, 60)},
        ):
            found, expected = (m(**inputs, use_cache=False) for m in (model, plain))
            assert torch.equal(found.logits, expected.logits)
    asked = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(IDS, **asked), plain.generate(IDS, **asked))


def test_no_parameter_is_read_while_its_module_is_not_running() -> None:
    """By name, for all of them at once: outside their module's forward, parameters are on the meta device."""
    model = tiny_model(seed=5)
    values = {name: parameter.data for name, parameter in model.named_parameters(remove_duplicate=False)}

    def put(module: torch.nn.Module, prefix: str, away: bool) -> None:
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                value = values[f"{prefix}.{name}"]
                value = value.to("meta") if away else value
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)

    for prefix, module in model.named_modules():
        if module._parameters:
            put(module, prefix, away=True)
            module.register_forward_pre_hook(lambda m, _a, prefix=prefix: put(m, prefix, away=False))
            module.register_forward_hook(lambda m, _a, _o, prefix=prefix: put(m, prefix, away=True))
    with torch.no_grad():
        plain, found = tiny_model(seed=5)(input_ids=IDS).logits, model(input_ids=IDS).logits
    assert torch.equal(found, plain)


def test_a_layout_follows_to_another_device() -> None:
    """accelerate moves what a layer is called with by its `to`."""
    from accelerate.utils import send_to_device

    from sft.models.sambay.layout_phi4flash import Documents, make_layout

    mask = torch.ones_like(IDS)
    mask[0, 0] = 0
    layout = make_layout((2, 30), IDS.device, Documents(attention_mask=mask)).keep_last(3)
    assert send_to_device(layout, "cpu") is layout
    moved = send_to_device(layout, "meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    assert {value.device.type for value in tensors.values()} == {"meta"}
    assert set(tensors) == {"cu_seqlens", "token_index", "keep_index", "keep_cu_seqlens", "key_mask"}
    assert (moved.batch_shape, moved.longest, moved.kept_columns) == ((2, 30), 30, 3)


def test_adapters_and_saved_copies_of_the_time_steps_projection_keep_its_bias() -> None:
    """Its bias is handed past whatever wraps the module; a tuner that adds it by itself doesn't see it twice."""
    from peft import HRAConfig, LoraConfig, get_peft_model

    with torch.no_grad():
        expected = tiny_model(seed=5)(input_ids=IDS).logits
        for config in (
            LoraConfig(r=2, target_modules=["dt_proj"]),
            LoraConfig(r=2, target_modules=["Wqkv"], modules_to_save=["dt_proj"]),
            HRAConfig(r=2, target_modules=["dt_proj"]),
        ):
            found = get_peft_model(tiny_model(seed=5), config).eval()(input_ids=IDS).logits
            assert (found - expected).abs().max() < 1e-5 * expected.abs().max(), type(config).__name__


def test_the_full_sizes_names_are_untouched() -> None:
    with torch.device("meta"):
        names = [name for name, _ in Phi4FlashForCausalLM(tiny_config()).named_parameters()]
    assert "model.layers.0.attn.dt_proj.bias" in names
    assert "model.layers.1.attn.inner_cross_attn.subln.weight" in names
