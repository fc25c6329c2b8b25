"""What an adapter stands on: the model that the run starts from, or weights in a folder of the run, by content."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.identity import start_identity
from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_json
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths

BASE = "base.json"
"""In `final/` of a LoRA stage: {"kind": "start"} or {"kind": "folder", "path": <relative to the run's folder>}, and the
base's content: a hash over what identifies the start, or over the folder's files."""


def start_base(paths: RunPaths) -> dict[str, Any]:
    """What base.json says of an adapter on the model that the run starts from."""
    return {"kind": "start", "content": sha256_json(start_identity(paths.recipe))}


def folder_base(paths: RunPaths, folder: Path) -> dict[str, Any]:
    """What base.json says of an adapter on the weights in a folder of the run."""
    return {
        "kind": "folder",
        "path": folder.relative_to(paths.root).as_posix(),
        "content": sha256_json(folder_hashes(folder, ("config.json", "*.safetensors"))),
    }


def read_base(final: Path) -> dict[str, Any]:
    """What `final/base.json` names as the adapter's base."""
    try:
        return dict(read_json(final / BASE))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{final / BASE} is missing or broken, so the adapter's base isn't known: train again."
        ) from error


def base_folder(paths: RunPaths, final: Path) -> Path | None:
    """The folder of the base of the adapter in `final`; None: it is the run's start.

    Raises UserError when the base isn't, byte for byte, the one that the adapter was trained on.
    """
    told = read_base(final)
    folder = None if told.get("kind") == "start" else paths.root / str(told.get("path"))
    now = start_base(paths) if folder is None else folder_base(paths, folder)
    if now != told:
        raise UserError(
            f"The base model of {final} is no longer the one its adapter was trained on: put it back, or train again."
        )
    return folder
