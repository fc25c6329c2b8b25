"""What a stage goes on from: the run's start, or what the stage before it handed on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.base import folder_base, read_base, start_base
from sft.models.lora import lora_settings
from sft.models.save import save_model
from sft.models.widen import HELD
from sft.run.identity import previous_stage
from sft.train.handover import (
    default_dtype,
    load_final,
    load_start,
    load_weights,
)
from sft.utils.distributed import decide
from sft.utils.files import atomic_folder, read_sealed, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage

MADE_FROM = "made_from.json"


@dataclass
class StartingPoint:
    """What a stage trains: a model (with adapters when it goes on training them), its tokenizer, its adapters' base."""

    model: Any
    tokenizer: Any
    base: dict[str, Any] | None


def starting_point(paths: RunPaths, stage: Stage) -> StartingPoint:
    """The model that `stage` goes on from.

    After a LoRA stage with the same LoRA settings the same adapter is trained on; otherwise it is merged first, and
    merged weights that get a new adapter are written to `stages/<name>/base`, so that the adapter's base stays.
    """
    before = previous_stage(paths, stage)
    settings, four_bit = lora_settings(stage), _four_bit(paths, stage)
    dtype = "float32" if settings is None else default_dtype(paths)
    if before is None:
        # Nothing is merged: float32 masters are made where they are trained.
        model, tokenizer = load_start(paths, dtype=dtype if settings else HELD, four_bit=four_bit)
        return StartingPoint(model, tokenizer, start_base(paths) if settings else None)
    final = paths.final_dir(before.name)
    same = settings is not None and settings == lora_settings(before)
    # An adapter that will be merged is merged into the weights as they are.
    model, tokenizer = load_final(paths, final, dtype=dtype, trainable=same, four_bit=four_bit if same else None)
    if not hasattr(model, "peft_config"):
        return StartingPoint(model, tokenizer, folder_base(paths, final) if settings else None)
    if same:
        return StartingPoint(model, tokenizer, read_base(final))
    if settings is None:
        return StartingPoint(model.merge_and_unload(), tokenizer, None)
    folder = paths.stage_dir(stage.name) / "base"
    base = decide(lambda: _merged_base(paths, folder, final, model))
    return StartingPoint(load_weights(paths, folder, dtype, four_bit), tokenizer, base)


def _four_bit(paths: RunPaths, stage: Stage) -> str | None:
    """What a stage on weights in 4 bits computes in; None where the recipe asks for none."""
    if not paths.recipe.model.load_in_4bit:
        return None
    return "bfloat16" if stage.train.bf16 is not False else "float32"


def _merged_base(paths: RunPaths, folder: Path, final: Path, model: Any) -> dict[str, Any]:
    """Write `model`, merged, to `folder`, unless it is there and whole, made from what `final` holds now."""
    source = sha256_json(folder_hashes(final))
    note = read_sealed(folder / MADE_FROM)
    if note is None or note != {"source": source, "base": folder_base(paths, folder)}:
        with atomic_folder(folder) as made:
            save_model(made, model)
        write_sealed(folder / MADE_FROM, {"source": source, "base": folder_base(paths, folder)})
    return folder_base(paths, folder)
