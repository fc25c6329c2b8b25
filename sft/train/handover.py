"""What a stage hands on: full weights, or an adapter beside the name of its base, in `stages/<name>/final`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.utils.errors import UserError
from sft.utils.files import atomic_folder, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.recipe.paths import RunPaths

BASE = "base.json"
"""In `final/` of a LoRA stage: {"kind": "start"} or {"kind": "folder", "path": <relative to the run's folder>}, and the
base's fingerprint."""


def save_final(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
) -> None:
    """Write the trained weights (or the adapter and the name of its base) and the tokenizer to `folder`, atomically.

    `weights`: the state dict to write, where the model itself holds only a part of it (DeepSpeed).
    """
    from sft.models.save import save_model

    with atomic_folder(folder) as path:
        if hasattr(model, "peft_config"):
            model.save_pretrained(path, state_dict=weights)
        else:
            save_model(path, model, weights=weights)
        tokenizer.save_pretrained(path)
        if base is not None:
            write_json(path / BASE, base)
        (path / "README.md").unlink(missing_ok=True)


def load_stage_model(
    layout: RunPaths, stage: str | None = None, *, dtype: str | None = None, trainable: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer after `stage`, or those the run starts from (None).

    A LoRA stage gives a PeftModel on its base. `dtype` ("float32", "bfloat16"): what the weights are held in; default:
    see `default_dtype`. Adapters are always held in float32.
    Raises UserError when the stage isn't done or its files are gone.
    """
    dtype = dtype or default_dtype(layout)
    if stage is None:
        return load_start(layout, dtype=dtype)
    final = layout.final_dir(stage)
    if not layout.stage_manifest(stage).exists() or not final.exists():
        raise UserError(
            f"Stage {stage} isn't done (no {layout.stage_manifest(stage)}): run `sft train --stage {stage}` first."
        )
    return load_final(layout, final, dtype=dtype, trainable=trainable)


def load_final(
    layout: RunPaths, final: Path, *, dtype: str, trainable: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that a `final/` folder holds."""
    from sft.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(str(final))
    if not (final / "adapter_config.json").exists():
        return _load_weights(layout, final, dtype), tokenizer
    return _with_adapter(layout, final, dtype, trainable), tokenizer


def _with_adapter(layout: RunPaths, final: Path, dtype: str, trainable: bool) -> Any:
    from peft import PeftModel

    base = read_base(final)
    if base["kind"] == "start":
        model, _ = load_start(layout, dtype=dtype)
    else:
        model = _load_weights(layout, layout.root / base["path"], dtype)
    if base.get("fingerprint") != fingerprint(model):
        raise UserError(
            f"The base model of {final} is no longer the one its adapter was trained on: put it back, or train again."
        )
    return PeftModel.from_pretrained(model, str(final), is_trainable=trainable)


def read_base(final: Path) -> dict[str, Any]:
    """What `final/base.json` names as the adapter's base."""
    try:
        return dict(read_json(final / BASE))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{final / BASE} is missing or broken, so the adapter's base isn't known: train again."
        ) from error


def load_start(layout: RunPaths, *, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that the run starts from. A model from scratch is held in float32 whatever `dtype` says:
    its random weights are drawn in that type."""
    from sft.models.load import load_model

    section = layout.recipe.model
    tokenizer = start_tokenizer(layout)
    dtype = "float32" if section.config is not None else dtype
    model = load_model(section.model_copy(update={"dtype": dtype}), tokenizer, seed=layout.recipe.seed)
    return model, tokenizer


def start_tokenizer(layout: RunPaths) -> PreTrainedTokenizerBase:
    """The tokenizer that the run starts with."""
    from sft.tokenizers.load import load_tokenizer

    section = layout.recipe.model
    if section.tokenizer:
        return load_tokenizer(section.tokenizer)
    return load_tokenizer(str(section.model_name_or_path), revision=section.model_revision)


def _load_weights(layout: RunPaths, folder: Path, dtype: str) -> PreTrainedModel:
    from sft.models.load import load_checkpoint

    return load_checkpoint(str(folder), dtype=dtype, trust_remote_code=layout.recipe.model.trust_remote_code)


def default_dtype(layout: RunPaths) -> str:
    """What the run's weights are held in on this machine: see `machine_dtype`."""
    from sft.models.load import machine_dtype

    section = layout.recipe.model
    options: dict[str, Any] = {"revision": section.model_revision, "trust_remote_code": section.trust_remote_code}
    return machine_dtype(section.model_name_or_path, section.dtype, **options)


def fingerprint(model: Any) -> str:
    """A hash of a model's own weights without its adapters: names, shapes and 16 values of each, rounded to bfloat16.

    The rounding makes it the same whether the weights are held in float32 or in bfloat16.
    """
    import torch

    digest = hashlib.sha256()
    for name, parameter in sorted(_own_parameters(model).items()):
        values = parameter.detach().flatten()
        sample = values[:: max(1, values.numel() // 16)][:16].to(torch.bfloat16).float().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} ".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def _own_parameters(model: Any) -> dict[str, Any]:
    """The model's parameters by the names they have without peft."""
    own = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name and ".modules_to_save." not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
            own[name] = parameter
    return own
