"""What makes two trainings of a stage the same training: the parts of its key, and the key."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.train.arguments import NEUTRAL
from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_file, sha256_json

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage

FORMAT = 1
"""Raised when stages made by an older version must not be continued."""


def stage_parts(layout: RunPaths, stage: Stage, data_key: str) -> dict[str, Any]:
    """Everything the stage's weights follow from, as nested JSON values that can be compared part by part."""
    train = stage.train.model_dump()
    return {
        "format": FORMAT,
        "stage": stage.name,
        "seed": layout.recipe.seed,
        "start": _start(layout, stage),
        "data": data_key,
        "train": {key: value for key, value in train.items() if key not in NEUTRAL},
    }


def stage_key(parts: dict[str, Any]) -> str:
    """The stage's key: a hash of its parts."""
    return sha256_json(parts)


def previous_stage(layout: RunPaths, stage: Stage) -> Stage | None:
    """The stage before `stage` in the recipe."""
    names = [other.name for other in layout.recipe.stages]
    index = names.index(stage.name)
    return layout.recipe.stages[index - 1] if index else None


def done_manifest(layout: RunPaths, stage: str) -> dict[str, Any] | None:
    """The manifest of a stage that is done and whose model is there, else None. A broken one raises UserError."""
    path = layout.stage_manifest(stage)
    if not path.exists():
        return None
    try:
        manifest: dict[str, Any] = read_json(path)
    except ValueError:
        manifest = {}
    if not isinstance(manifest, dict) or not {"key", "parts", "steps"} <= manifest.keys():
        raise UserError(f"{path} is broken: start the stage again with --restart {stage}.")
    if not layout.final_dir(stage).exists():
        raise UserError(f"Stage {stage} is done, but {layout.final_dir(stage)} is gone: use --restart {stage}.")
    return manifest


def _start(layout: RunPaths, stage: Stage) -> dict[str, Any]:
    before = previous_stage(layout, stage)
    if before is not None:
        manifest = done_manifest(layout, before.name)
        if manifest is None:
            raise UserError(f"Stage {stage.name} starts from stage {before.name}, which isn't done: train that first.")
        return {"stage": before.name, "key": manifest["key"]}
    return start_parts(layout)


def start_parts(layout: RunPaths) -> dict[str, Any]:
    """What the run's first model follows from, but for the seed."""
    section = layout.recipe.model
    parts: dict[str, Any] = section.model_dump(exclude={"trust_remote_code"})
    folder = Path(section.model_name_or_path or "")
    if section.model_name_or_path and folder.is_dir():
        parts["files"] = _files(folder)
    return parts


def _files(folder: Path) -> dict[str, Any]:
    """Sizes of a checkpoint's weights and the hash of its configuration: a changed folder is another model."""
    found: dict[str, Any] = {p.name: p.stat().st_size for p in sorted(folder.glob("*.safetensors"))}
    config = folder / "config.json"
    return found | ({"config.json": sha256_file(config)} if config.exists() else {})
