"""What a stage hands on: each tensor once, by the published names, whichever engine it comes from."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import saved_weights, tiny_qwen, tiny_sambay, tiny_tokenizer, toy_recipe

import sft.models.load
from sft.models.load import load_checkpoint, machine_dtype, parameter_count
from sft.recipe.paths import RunPaths
from sft.train.handover import default_dtype, save_final
from sft.utils.files import read_json


def as_deepspeed_gives_it(model: Any) -> dict[str, torch.Tensor]:
    """A state dict in which tied tensors are two (ZeRO-1 and 2 gather each name by itself)."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen])
def test_a_tied_head_is_written_once(make: Any, tmp_path: Path) -> None:
    model = make()
    weights = as_deepspeed_gives_it(model)
    assert "lm_head.weight" in weights
    weights["model.embed_tokens.weight"] += 1  # what is written comes from the state dict, not from the model
    save_final(tmp_path / "final", model, tiny_tokenizer(), weights=weights)
    found = saved_weights(tmp_path / "final")
    assert set(found) == set(weights) - {"lm_head.weight"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in found.items())
    loaded = load_checkpoint(str(tmp_path / "final"), dtype="float32")
    assert torch.equal(loaded.lm_head.weight, weights["model.embed_tokens.weight"])


@pytest.mark.parametrize("make", [tiny_sambay, tiny_qwen])
def test_a_head_of_its_own_is_written(make: Any, tmp_path: Path) -> None:
    model = make(tie_word_embeddings=False)
    for name, weights in (("engine", as_deepspeed_gives_it(model)), ("plain", None)):
        save_final(tmp_path / name, model, tiny_tokenizer(), weights=weights)
        found = saved_weights(tmp_path / name)
        assert set(found) == set(model.state_dict())
        assert torch.equal(found["lm_head.weight"], model.lm_head.weight)
        assert read_json(tmp_path / name / "config.json")["tie_word_embeddings"] is False


def test_a_killed_hand_over_is_taken_up(tmp_path: Path) -> None:
    left = tmp_path / ".final.tmp-999999999"
    left.mkdir()
    save_final(tmp_path / "final", tiny_qwen(), tiny_tokenizer())
    assert [path.name for path in tmp_path.iterdir()] == ["final"]


# ---- what weights are held in ----


def layout_of(folder: Path, **model: Any) -> RunPaths:
    return RunPaths(toy_recipe(folder, {}, model={"model_name_or_path": str(folder / "start"), **model}))


def test_a_cpu_holds_small_models_in_float32_and_large_ones_as_the_recipe_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_sambay()
    model.save_pretrained(tmp_path / "start")
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert parameter_count(str(tmp_path / "start")) == size // 4
    for bound, dtype in ((size, "float32"), (size - 1, "bfloat16")):
        monkeypatch.setattr(sft.models.load, "CPU_FLOAT32", bound)
        machine_dtype.cache_clear()
        assert default_dtype(layout_of(tmp_path, dtype="bfloat16")) == dtype
        assert default_dtype(layout_of(tmp_path, dtype="float32")) == "float32"
        assert default_dtype(layout_of(tmp_path, dtype="bfloat16")) == dtype
    lines = capsys.readouterr().err.splitlines()
    told = [line for line in lines if "is held in bfloat16 on this CPU: float32 would take" in line]
    assert len(told) == 1, "once"
    machine_dtype.cache_clear()


def resident() -> int:
    """Bytes of this process's own memory, mapped files aside."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_weights_in_their_own_type_stay_in_the_file(tmp_path: Path) -> None:
    model = tiny_sambay(hidden_size=512, intermediate_size=2048, vocab_size=20_000).bfloat16()
    model.save_pretrained(tmp_path)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    del model
    load_checkpoint(str(tmp_path), dtype="auto")  # whatever a first load takes
    before = resident()
    loaded = load_checkpoint(str(tmp_path), dtype="auto")
    assert loaded.lm_head.weight.dtype == torch.bfloat16 and size > 50_000_000
    with torch.no_grad():
        loaded(torch.arange(20)[None])
    assert resident() - before < size / 2
