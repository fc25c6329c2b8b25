"""What answers for a model that is training: its weights, and nothing that training has put around them."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from train_toys import tiny_qwen, tiny_sambay, tiny_tokenizer, toy_recipe
from transformers import PreTrainedModel

from sft.evaluate.runner import model_fingerprint
from sft.models.base import start_base
from sft.models.load import load_checkpoint
from sft.models.lora import attach_adapters, lora_settings
from sft.models.lora_targets import check_targets
from sft.models.sambay_decoding import decoder_weights
from sft.recipe.paths import RunPaths
from sft.train.engine import fresh_engine
from sft.train.handover import load_answering, save_final
from sft.train.live import answering_model, copied_bytes
from sft.train.probe import undisturbed

IDS = torch.tensor([[5, 9, 23, 4, 77, 12]])


def trainer_of(model: Any) -> Any:
    return SimpleNamespace(model=model)


def in_training(model: PreTrainedModel) -> PreTrainedModel:
    """A model with all that training puts around one, each of which would change what it says."""
    model.train()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output + 1)
    head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    own = model.forward
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
    return model


@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay])
def test_it_says_what_the_model_says_without_training(make: Any) -> None:
    plain, live = make().eval(), in_training(make())
    before = {name: vars(module).copy() for name, module in live.named_modules()}
    with answering_model(trainer_of(live), "float32") as model, torch.no_grad():
        assert not any(module.training for module in model.modules())
        assert torch.equal(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert not torch.equal(live(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        assert (decoder_weights(model) is None) == (make is tiny_qwen)
        for name, parameter in model.named_parameters():
            assert parameter.data_ptr() == live.get_parameter(name).data_ptr() and not parameter.requires_grad
    assert copied_bytes(live, "float32") == 0
    for name, module in live.named_modules():
        assert vars(module).keys() == before[name].keys() and module.training
        assert all(vars(module)[key] is value for key, value in before[name].items())
    assert all(parameter.requires_grad for parameter in live.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("make", [tiny_qwen, tiny_sambay])
def test_it_is_held_as_the_model_in_its_folder_is(tmp_path: Path, make: Any, dtype: str) -> None:
    live = in_training(make())
    make().save_pretrained(tmp_path)
    loaded = load_checkpoint(str(tmp_path), dtype=dtype)
    with answering_model(trainer_of(live), dtype) as model:
        assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in loaded.named_parameters()}
        assert model_fingerprint(model) == model_fingerprint(loaded)
    copied = {n: p for n, p in loaded.named_parameters() if p.dtype != torch.float32}
    assert copied_bytes(live, dtype) == sum(2 * p.numel() for p in copied.values())
    assert {p.dtype for p in live.parameters()} == {torch.float32}


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True, "lora_target_modules": ["fc1", "out_proj"]},
    "a whole module": {"lora_modules_to_save": ["conv1d"]},
    "single weights": {"lora_target_parameters": ["A_log"], "lora_dropout": 0.0},
}


@pytest.mark.parametrize(
    "kind, held, dtype", [*((kind, "float32", "bfloat16") for kind in KINDS), ("plain", "bfloat16", "float32")]
)
def test_adapters_answer_on_their_base_in_another_type(
    tmp_path: Path, kind: str, held: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they do from their folder; and the base that they are trained on stays in its own."""
    tiny_sambay().save_pretrained(tmp_path / "start")
    tiny_tokenizer().save_pretrained(tmp_path / "start")
    paths = RunPaths(toy_recipe(tmp_path, {"use_peft": True, "lora_r": 2, **KINDS[kind]}))
    base = load_checkpoint(str(tmp_path / "start"), dtype=held)
    settings = lora_settings(paths.recipe.stages[0])
    assert settings is not None
    check_targets(base, settings, "train")
    live = attach_adapters(base, settings, seed=1)
    before = {name: parameter.dtype for name, parameter in live.named_parameters()}
    with torch.no_grad():
        for name, parameter in live.named_parameters():
            parameter += 0.1 * ("lora_B" in name)
    save_final(tmp_path / "final", live, tiny_tokenizer(), base=start_base(paths))
    monkeypatch.setattr("sft.train.handover.default_dtype", lambda paths: held)
    loaded, _ = load_answering(paths, tmp_path / "final", dtype)
    with answering_model(trainer_of(in_training(live)), dtype) as model, torch.no_grad():
        types = {name: parameter.dtype for name, parameter in model.named_parameters()}
        assert types == {name: parameter.dtype for name, parameter in loaded.named_parameters()}
        assert {types[name] for name in types if "lora_" in name or "A_log" in name} == {torch.float32}
        assert {types[name] for name in types if "conv1d" in name and "lora_" not in name} == {getattr(torch, dtype)}
        assert model_fingerprint(model) == model_fingerprint(loaded)
        assert torch.equal(model(input_ids=IDS).logits, loaded.eval()(input_ids=IDS).logits)
    assert {name: parameter.dtype for name, parameter in live.named_parameters()} == before


def test_one_changed_value_is_another_model() -> None:
    model = tiny_qwen()
    key = model_fingerprint(model)
    with torch.no_grad():
        weight = model.model.layers[0].mlp.up_proj.weight
        weight[1, 1] = torch.nextafter(weight[1, 1], torch.tensor(9.0))
    assert model_fingerprint(model) != key


def test_no_random_state_is_touched() -> None:
    def drawn() -> tuple[Any, ...]:
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seeded() -> None:
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(3)

    model = tiny_qwen()
    seeded()
    expected = drawn()
    seeded()
    with undisturbed(model):
        drawn()
    assert drawn() == expected


def test_what_a_stage_switches_for_the_process_is_off_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ZeRO-3's own linear is."""
    plain = torch.nn.functional.linear
    with fresh_engine():
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.deterministic = True
        monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: plain(*args))
        own = torch.nn.functional.linear
        with answering_model(trainer_of(tiny_qwen()), "float32"):
            assert not torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.deterministic
            assert torch.nn.functional.linear is plain
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.backends.cudnn.deterministic and torch.nn.functional.linear is own
    assert not torch.are_deterministic_algorithms_enabled() and torch.nn.functional.linear is plain
