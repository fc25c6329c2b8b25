"""What one run takes over from others: a stage that they have trained from the same parts, known by its key."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.run.identity import stage_key
from sft.utils.files import atomic_folder, read_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage

LEFT = ("checkpoint-*", ".*")
"""What only the run itself needs of a stage's folder: to continue its training, and what is half written."""


def take_stage(
    paths: RunPaths, stage: Stage, parts: dict[str, Any], others: Sequence[RunPaths]
) -> dict[str, Any] | None:
    """The manifest of the stage as one of `others` has trained it from `parts`, its folder taken over whole.

    None where nobody has, and where this run has begun the stage itself. `parts` are all that the weights follow from
    (sft.run.identity.stage_parts), so what is taken is what training would make.
    """
    folder, key = paths.stage_dir(stage.name), stage_key(parts)
    if folder.exists():
        return None
    for other in others:
        manifest = read_sealed(other.stage_manifest(stage.name))
        if manifest is None or manifest.get("key") != key:
            continue
        final = other.final_dir(stage.name)
        if not final.is_dir() or folder_hashes(final) != manifest["files"]:
            say(f"{stage.name}: {final} is no longer what was trained there, so it isn't taken over")
            continue
        copy_folder(other.stage_dir(stage.name), folder, left=LEFT)
        say(f"{stage.name}: trained already in {other.root}, taken over")
        return manifest
    return None


def copy_folder(source: Path, target: Path, *, left: Sequence[str] = ()) -> None:
    """Put a copy of `source` in the place of `target` in one step, without what the patterns `left` name.

    Weights, which nobody ever writes into, aren't doubled on the disk where its file system has links.
    """
    with atomic_folder(target) as made:
        shutil.copytree(source, made, ignore=shutil.ignore_patterns(*left), copy_function=_copy, dirs_exist_ok=True)


def _copy(source: str, target: str) -> str:
    if source.endswith(".safetensors"):
        with suppress(OSError):  # no links on this file system, or none across two
            os.link(source, target)
            return target
    return shutil.copy2(source, target)
