"""Adapters: merged and shown to be the same, or exported as they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sft.hub.export import export
from sft.hub.folder import MANIFEST
from sft.hub.merge import check_merge, logits_of, merged_logits
from sft.hub.reload import fixed_inputs, relative_error
from sft.models.base import folder_base, start_base
from sft.recipe import RunPaths, load_recipe
from sft.utils.errors import UserError
from sft.utils.files import read_json, write_json

INPUTS = fixed_inputs(320)

# The shape of the tiny SambaY, as a recipe writes it.
SHAPE = (
    "vocab_size: 320, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 8, num_attention_heads: 4, "
    "num_key_value_heads: 2, sliding_window: 8"
)


@pytest.fixture
def adapted(tiny_sambay: Callable[..., Any]) -> Callable[..., Any]:
    """Makes a PeftModel with a random adapter: adapted(dtype, size of B, dora)."""

    def make(dtype: str = "float32", size: float = 0.05, dora: bool = False) -> Any:
        from peft import LoraConfig, get_peft_model

        from sft.models.load import lora_target_modules

        base = tiny_sambay(dtype)
        # DoRA as peft writes it takes the layer's bias for a part of its output, which it isn't in dt_proj.
        targets = [name for name in lora_target_modules(base.config) if not (dora and name == "dt_proj")]
        config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, use_dora=dora, task_type="CAUSAL_LM")
        model = get_peft_model(base, config)
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=size)
        return model.eval()

    return make


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dora", [False, True])
def test_merging_keeps_the_logits(adapted: Callable[..., Any], dora: bool, dtype: str) -> None:
    """In float32 whatever the model is held in, so that a merge which loses something is told apart from rounding."""
    model = adapted(dtype, dora=dora)
    wanted, before = logits_of(copy.deepcopy(model).float(), INPUTS), logits_of(model, INPUTS)
    merged, report = merged_logits(model, INPUTS)
    assert report.error < 1e-5 < 0.05 < report.effect and report.tolerance <= 1e-4
    assert max(relative_error(a, b) for a, b in zip(merged, wanted, strict=True)) < 1e-5
    after = logits_of(model, INPUTS)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True)), "the model in memory stays as it was"


def test_a_merge_that_loses_the_adapter_is_refused(adapted: Callable[..., Any]) -> None:
    """Also when the adapter does little: a no-op merge differs by less than a loose bound would allow."""
    for size in (0.05, 2e-4):
        model = adapted(size=size)
        wanted = logits_of(model, INPUTS)
        with model.disable_adapter():
            base = logits_of(model, INPUTS)
        with pytest.raises(UserError, match="merging the adapter changes the logits by"):
            check_merge(base, wanted, base, "float32")
        assert check_merge(wanted, wanted, base, "float32").error == 0


def test_a_merge_with_nan_is_refused(adapted: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted()
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).fill_(float("nan"))
    with pytest.raises(UserError, match="can't be merged: the merged weights aren't finite"):
        export((model, None), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_adapter_in_memory_is_exported_merged(adapted: Callable[..., Any], tmp_path: Path) -> None:
    model = adapted("bfloat16")
    out = export((model, None), tmp_path / "out")
    manifest = read_json(out / MANIFEST)
    # The one compared in float32, the other in the type of the file, which plain torch rounds to in other places.
    assert manifest["merge"]["error"] < 1e-5 and manifest["reload"]["error"] < 3e-2
    assert manifest["dtype"] == "bfloat16" and manifest["architecture"] == "Phi4FlashForCausalLM"
    base = copy.deepcopy(model).unload()
    assert manifest["parameters"] == sum(parameter.numel() for parameter in base.parameters())


def test_a_full_disk_names_its_need(
    adapted: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sft.models.save

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sft.models.save, "write_safetensors", full)
    with pytest.raises(UserError, match=r"the disk of .* is full; the export needs about 0\.0 GB"):
        export((adapted(), None), tmp_path / "out", check=False)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def run(adapted: Callable[..., Any], sambay: tuple[Any, Any], tmp_path: Path) -> Path:
    """A run of a full stage and a LoRA stage, as `sft.train` leaves it."""
    root = tmp_path / "run"
    model = adapted()
    base = copy.deepcopy(model).unload()
    first, second = root / "stages" / "full" / "final", root / "stages" / "lora" / "final"
    base.save_pretrained(first)
    model.save_pretrained(second)
    for folder in (first, second):
        sambay[1].save_pretrained(folder)
    source = "{generate: {family: arithmetic, rows: 10}}"
    stages = "".join(
        f"  - {{name: {name}, data: {{sources: [{source}]}}, train: {{max_length: 64}}}}\n" for name in ("full", "lora")
    )
    (root / "resolved.yaml").write_text(
        f"name: trial\noutput_dir: {root}\nmodel: {{tokenizer: tiny, dtype: float32, config: {{{SHAPE}}}}}\n"
        f"stages:\n{stages}"
    )
    paths = RunPaths(load_recipe(root / "resolved.yaml"))
    write_json(second / "base.json", folder_base(paths, first))
    return root


def test_a_lora_stage_is_exported_merged(run: Path, adapted: Callable[..., Any], tmp_path: Path) -> None:
    out = export(run / "stages" / "lora" / "final", tmp_path / "out")
    manifest = read_json(out / MANIFEST)
    assert manifest["merge"]["error"] < 1e-5 and manifest["reload"]["error"] < 1e-5
    assert manifest["dtype"] == "float32" and manifest["adapter_base"] is None
    assert manifest["run"]["name"] == "trial" and (out / "recipe.yaml").exists()
    from sft.models.load import load_checkpoint

    found = logits_of(load_checkpoint(str(out), dtype="float32"), INPUTS)
    errors = [relative_error(a, b) for a, b in zip(found, logits_of(adapted(), INPUTS), strict=True)]
    assert max(errors) < 1e-5
    assert "adapters were merged" in (out / "README.md").read_text()


def test_a_lora_stage_is_exported_as_it_is(run: Path, tmp_path: Path) -> None:
    out = export(run / "stages" / "lora" / "final", tmp_path / "out", merge_lora=False)
    assert (out / "adapter_model.safetensors").exists() and not (out / "model.safetensors").exists()
    manifest = read_json(out / MANIFEST)
    assert Path(manifest["adapter_base"]).is_absolute() and manifest["reload"]["error"] < 1e-5
    assert read_json(out / "adapter_config.json")["base_model_name_or_path"] == manifest["adapter_base"]
    assert "AutoPeftModelForCausalLM" in (out / "README.md").read_text()


def test_an_adapter_without_a_base_is_refused(run: Path, tmp_path: Path) -> None:
    final = run / "stages" / "lora" / "final"
    (final / "base.json").unlink()
    config = read_json(final / "adapter_config.json")
    write_json(final / "adapter_config.json", {**config, "base_model_name_or_path": None})
    with pytest.raises(UserError, match="doesn't say what its base model is"):
        export(final, tmp_path / "out")
    write_json(final / "base.json", start_base(RunPaths(load_recipe(run / "resolved.yaml"))))
    with pytest.raises(UserError, match="was made in this run and has no name"):
        export(final, tmp_path / "out", merge_lora=False)
    (run / "resolved.yaml").unlink()
    with pytest.raises(UserError, match=r"resolved\.yaml is gone"):
        export(final, tmp_path / "out")
