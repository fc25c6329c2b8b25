"""QLoRA: told where it can't be, before anything is loaded; and, on a stand-in for a GPU's loader, what that is asked.

There is no CUDA device here: how bitsandbytes computes isn't tested.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_models import FAMILIES, write_chats, write_model
from pydantic import ValidationError
from train_toys import saved_weights

from sft.cli.main import main
from sft.models import four_bit
from sft.models.load import load_checkpoint
from sft.recipe import Recipe
from sft.utils.files import read_json

LLAMA = FAMILIES[0]
RECIPE: dict[str, Any] = {
    "name": "q",
    "output_dir": "out",
    "model": {"model_name_or_path": "some/model", "load_in_4bit": True},
    "stages": [{"name": "a", "data": {"sources": [{"path": "a.jsonl"}]}, "train": {"use_peft": True}}],
}


def stage(**train: Any) -> dict[str, Any]:
    return {"stages": [{**RECIPE["stages"][0], "train": train}]}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (stage(), "stage a trains all weights, which 4 bits can't hold: set its train.use_peft"),
        (stage(use_peft=True, lora_dropout=0.0, lora_target_parameters=["x"]), "adapts lora_target_parameters"),
        (stage(use_peft=True, deepspeed="zero3"), "stage a has ZeRO-3"),
        (stage(use_peft=True, use_cpu=True), "stage a has use_cpu, and weights in 4 bits need a GPU"),
        ({"model": {"config": {}, "tokenizer": "tiny", "load_in_4bit": True}}, "is for a checkpoint"),
    ],
)
def test_what_can_not_be(change: dict[str, Any], line: str) -> None:
    assert Recipe.model_validate(RECIPE).model.load_in_4bit
    with pytest.raises(ValidationError, match=line):
        Recipe.model_validate({**RECIPE, **change})


def words(root: Path) -> list[str]:
    data = write_chats(root / "data.jsonl", 12) if not (root / "data.jsonl").exists() else root / "data.jsonl"
    values = ["--variables.data", str(data), "--variables.model", str(root / "model")]
    return ["lora-chat", *values, "--output_dir", str(root / "run"), "--model.chat_template", LLAMA.template]


@pytest.mark.parametrize("flag", [[], ["--dry_run"]])
def test_without_a_gpu_it_is_told_at_its_line(flag: list[str], tmp_path: Path, capsys: Any) -> None:
    write_model(tmp_path / "model", LLAMA)
    capsys.readouterr()
    assert main(["run", *words(tmp_path), "--model.load_in_4bit", "true", *flag]) == 2
    told = capsys.readouterr().err
    assert told == (
        "sft: --model.load_in_4bit: needs a CUDA GPU, and none is visible here; leave it out to train adapters on the "
        "weights as they are\n"
    )
    assert not (tmp_path / "run").exists()


def test_without_bitsandbytes_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'sambay-sft[cuda]'" in (four_bit.four_bit_problem() or "")


class Loader:
    """Stands for transformers' loader on a GPU: notes what it is asked, and gives the weights rounded coarsely."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import AutoModelForCausalLM, PreTrainedModel

        self.asked: list[dict[str, Any]] = []
        self._real = AutoModelForCausalLM.from_pretrained
        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", self.load)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(four_bit, "four_bit_problem", lambda: None)
        # transformers counts packed weights by bitsandbytes' own classes.
        plain = PreTrainedModel.num_parameters
        monkeypatch.setattr(PreTrainedModel, "num_parameters", lambda model, **how: _counted(plain, model, how))

    def load(self, name: str, **options: Any) -> Any:
        config, place = options.pop("quantization_config", None), options.pop("device_map", None)
        model, info = self._real(name, **options)
        if config is not None:
            self.asked.append({**config.to_dict(), "device_map": place, "dtype": options["dtype"]})
            for layer in (m for m in model.modules() if isinstance(m, torch.nn.Linear)):
                layer.weight.data = (layer.weight.data * 64).round() / 64
            model.is_loaded_in_4bit = True
        return model, info


def _counted(count: Any, model: Any, how: dict[str, Any]) -> int:
    flag = model.__dict__.pop("is_loaded_in_4bit", None)
    try:
        return int(count(model, **how))
    finally:
        if flag is not None:
            model.is_loaded_in_4bit = flag


def test_the_loader_is_asked_as_qlora_is_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model", LLAMA)
    loader = Loader(monkeypatch)
    model = load_checkpoint(str(tmp_path / "model"), dtype="bfloat16", four_bit="bfloat16")
    (asked,) = loader.asked
    wanted = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "bfloat16",
        "device_map": {"": 0},
        "dtype": torch.bfloat16,
    }
    assert {key: asked[key] for key in wanted} == wanted
    # What peft's prepare_model_for_kbit_training does: all frozen, and norms and embeddings in float32.
    assert not any(p.requires_grad for p in model.parameters())
    assert model.model.norm.weight.dtype == model.get_input_embeddings().weight.dtype == torch.float32


def test_adapters_are_trained_on_four_bits_and_merged_into_the_weights_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = write_model(tmp_path / "model", LLAMA)
    loader = Loader(monkeypatch)
    more = ["--model.load_in_4bit", "true", "--model.dtype", "float32", "--stages.chat.train.learning_rate", "1e-2"]
    assert main(["run", *words(tmp_path), *more]) == 0
    assert len(loader.asked) == 1 and loader.asked[0]["bnb_4bit_compute_dtype"] == "bfloat16"
    final, exported = tmp_path / "run/stages/chat/final", saved_weights(tmp_path / "run/export")
    adapter = saved_weights(final)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float32}
    # bfloat16 adapters would be multiples of their last bit.
    assert any(not torch.equal(t, t.bfloat16().float()) for name, t in adapter.items() if "lora_B" in name)
    told = read_json(final / "adapter_config.json")
    for name, weight in saved_weights(start).items():
        parts = [adapter.get(f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight") for x in "BA"]
        change = 0 if parts[0] is None else parts[0] @ parts[1] * (told["lora_alpha"] / told["r"])
        torch.testing.assert_close(exported[name], weight + change, rtol=0, atol=1e-6)
    manifest = json.loads((tmp_path / "run/stages/chat/manifest.json").read_text())
    assert manifest["parts"]["load_in_4bit"] is True
