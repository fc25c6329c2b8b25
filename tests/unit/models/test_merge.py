"""Merging a tensor at a time is what peft's merge_and_unload is in float32, rounded once; the model stays as it is."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from train_toys import tiny_qwen, tiny_sambay

from sft.models.load import LORA_TARGETS, load_checkpoint
from sft.models.merge import computing_in_float32, final_tensors
from sft.models.save import save_model
from sft.utils.errors import UserError
from sft.utils.files import read_json

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True, "target_modules": [name for name in LORA_TARGETS if name != "dt_proj"]},
    "ranks of their own": {"rank_pattern": {"fc1": 2}, "alpha_pattern": {"fc2": 32}},
    "modules to save": {"modules_to_save": ["final_layernorm", "x_proj"], "target_modules": ["fc1"]},
    "the embedding is trained apart": {"modules_to_save": ["embed_tokens"], "target_modules": ["fc1"]},
    "parameters": {"target_modules": ["fc2"], "target_parameters": ["in_proj.weight", "fc1.weight"]},
}


def adapted(model: Any, **options: Any) -> Any:
    """A PeftModel whose adapter does something."""
    config = {"r": 4, "lora_alpha": 8, "target_modules": list(LORA_TARGETS), "task_type": "CAUSAL_LM", **options}
    wrapped = get_peft_model(model, LoraConfig(**config))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return wrapped.eval()


def by_peft(model: Any) -> Any:
    """What peft makes of it in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return copy.deepcopy(model).float().merge_and_unload(safe_merge=True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_tensors_are_those_of_peft(kind: str, dtype: str, tmp_path: Path) -> None:
    model = adapted(tiny_sambay().to(getattr(torch, dtype)), **KINDS[kind])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = by_peft(model)
    count = save_model(tmp_path, model, dtype=dtype, max_shard_size="40KB")
    found, names = stored(tmp_path), set(wanted.state_dict())
    tied = wanted.config.tie_word_embeddings
    assert set(found) == names - {"lm_head.weight"} if tied else names
    assert read_json(tmp_path / "config.json")["tie_word_embeddings"] == tied
    for name, tensor in found.items():
        exact = wanted.state_dict()[name]
        wide = any(part in name for part in ("A_log", "lambda_"))
        assert torch.equal(tensor, exact if wide else exact.to(getattr(torch, dtype))), name
    assert count == sum(tensor.numel() for tensor in found.values())
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name: t.dtype for name, t in after.items()} == {name: t.dtype for name, t in before.items()}
    loaded = load_checkpoint(str(tmp_path), dtype="auto")
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in found.items())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_in_float32_compute_what_the_whole_does(kind: str) -> None:
    """Bit for bit, with the adapter, without it and merged; in bfloat16 outside as before."""
    model, ids = adapted(tiny_sambay().bfloat16(), **KINDS[kind]), torch.arange(3, 40)[None]
    wide, merged = copy.deepcopy(model).float(), by_peft(model)
    with torch.no_grad():
        narrow = model(ids).logits
        with computing_in_float32(model):
            assert torch.equal(model(ids).logits, wide(ids).logits)
            with model.disable_adapter(), wide.disable_adapter():
                assert torch.equal(model(ids).logits, wide(ids).logits)
        with computing_in_float32(model, merged=True):
            assert torch.equal(model(ids).logits, merged(ids).logits)
        assert torch.equal(model(ids).logits, narrow) and narrow.dtype == torch.bfloat16


def test_an_error_inside_leaves_the_model_as_it_was() -> None:
    model = adapted(tiny_sambay().bfloat16())
    types = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    with pytest.raises(IndexError), computing_in_float32(model, merged=True):
        model(torch.tensor([[10_000]]))
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == types
    assert not any(getattr(layer, "merged_adapters", None) for layer in model.modules())
    assert not any(layer._forward_pre_hooks or layer._forward_hooks for layer in model.modules())


def test_other_models_merge_too(tmp_path: Path) -> None:
    model = adapted(tiny_qwen().bfloat16(), target_modules="all-linear", use_dora=True)
    wanted = by_peft(model).bfloat16()
    save_model(tmp_path, model)
    found = stored(tmp_path)
    assert set(found) == set(wanted.state_dict()) - {"lm_head.weight"}
    assert all(torch.equal(tensor, wanted.state_dict()[name]) for name, tensor in found.items())


def test_tensors_go_by_the_published_names(tmp_path: Path) -> None:
    """transformers fuses the experts of a Mixtral while it loads them; its own save undoes that."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    config.num_attention_heads, config.num_key_value_heads, config.num_local_experts = 4, 2, 4
    model = MixtralForCausalLM(config)
    model.save_pretrained(tmp_path / "theirs")
    save_model(tmp_path / "ours", model)
    ours, theirs = stored(tmp_path / "ours"), stored(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and any("experts.3." in name for name in ours)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_files_are_those_that_transformers_writes(tmp_path: Path) -> None:
    """The same tensors in the same shards, the same index and configurations."""
    model = tiny_sambay()
    model.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    save_model(tmp_path / "ours", model, max_shard_size="60KB")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == names and len(names) > 5
    for name in names:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name.endswith(".json"):
            assert read_json(ours) == read_json(theirs), name
        else:
            mine, others = load_file(ours), load_file(theirs)
            assert mine.keys() == others.keys() and all(torch.equal(mine[key], others[key]) for key in mine)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_two_tied_tensors_is_refused(target: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        model = adapted(tiny_sambay(), target_modules=["fc1", target])
    with pytest.raises(UserError, match=r"can't be merged: it changes one of .*embed_tokens.*lm_head|lm_head.*embed"):
        final_tensors(model)


def test_an_adapter_that_is_no_change_of_weights_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match=r"can't be merged: an adapter of type PROMPT_TUNING isn't a change of weights"):
        final_tensors(get_peft_model(tiny_qwen(), config))


def test_a_broken_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted(tiny_sambay())
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(UserError, match=r"can't be merged: the merged weights aren't finite"):
        save_model(tmp_path, model)
