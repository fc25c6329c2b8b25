"""Checkpoints that count only when whole: a marker with every file's size is written last, older ones go after it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.utils.errors import UserError
from sft.utils.files import flush, read_json, sha256_file, write_json

MARKER = "complete.json"
HASHED_BELOW = 1 << 20
"""Files smaller than this many bytes are hashed too; for the big ones the size has to do."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its step, its folder and what its marker says."""

    step: int
    path: Path
    marker: dict[str, Any]


def write_marker(folder: Path, *, step: int, identity: Mapping[str, Any], counters: Mapping[str, Any]) -> None:
    """Declare `folder` a whole checkpoint: flush all its files to disk, then write the marker."""
    marker = folder / MARKER
    marker.unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        flush(path)
        size = path.stat().st_size
        files[path.relative_to(folder).as_posix()] = {"size": size} | (
            {"sha256": sha256_file(path)} if size < HASHED_BELOW else {}
        )
    flush(folder)
    write_json(marker, {"step": step, "identity": dict(identity), "counters": dict(counters), "files": files})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The folder's marker if every file it lists is there as it was written, else None."""
    try:
        marker = read_json(folder / MARKER)
        for name, entry in marker["files"].items():
            path = folder / name
            if path.stat().st_size != entry["size"] or ("sha256" in entry and sha256_file(path) != entry["sha256"]):
                return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return marker


def checkpoint_folders(stage_dir: Path) -> list[tuple[int, Path]]:
    """All `checkpoint-N` folders, whole or not, by step."""
    found = [
        (int(p.name.split("-")[1]), p)
        for p in stage_dir.glob("checkpoint-*")
        if re.fullmatch(r"checkpoint-\d+", p.name)
    ]
    return sorted(found)


def whole_checkpoints(stage_dir: Path, *, remove_broken: bool) -> list[Checkpoint]:
    """The whole checkpoints by step; half-written ones are removed when asked."""
    whole = []
    for step, path in checkpoint_folders(stage_dir):
        marker = read_marker(path)
        if marker is not None:
            whole.append(Checkpoint(step, path, marker))
        elif remove_broken:
            shutil.rmtree(path)
    return whole


def resumable(stage_dir: Path, identity: Mapping[str, Any], *, remove_broken: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint, to go on from; None when there is none.

    Raises UserError when it was made by another recipe, data or world size: going on would mix two runs.
    """
    whole = whole_checkpoints(stage_dir, remove_broken=remove_broken)
    if not whole:
        return None
    newest = whole[-1]
    difference = describe_difference(newest.marker["identity"], identity)
    if difference:
        raise UserError(
            f"{newest.path} can't be continued: {difference}. Put the recipe back as it was, start the stage again "
            f"with --restart {identity.get('stage', stage_dir.name)}, or choose another output_dir."
        )
    return newest


def rotate(stage_dir: Path, limit: int | None) -> None:
    """Delete the oldest whole checkpoints until `limit` are left (None: keep all)."""
    if limit is None:
        return
    whole = [path for _, path in checkpoint_folders(stage_dir) if (path / MARKER).exists()]
    for path in whole[: max(0, len(whole) - limit)]:
        # Without its marker first: a kill in the middle must not leave a folder that looks whole.
        (path / MARKER).unlink()
        shutil.rmtree(path)


def describe_difference(old: Any, new: Any, where: str = "") -> str:
    """The first few places where two nested values differ, in words; empty when they are equal."""
    found = _differences(old, new, where)
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return ", ".join(found[:3]) + more


def _differences(old: Any, new: Any, where: str) -> list[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted(set(old) | set(new)):
            inner = f"{where}.{key}" if where else str(key)
            found += _differences(old.get(key), new.get(key), inner)
        return found
    return [] if old == new else [f"{where} was {_short(old)}, is now {_short(new)}"]


def _short(value: Any) -> str:
    if value is None:
        return "not set"
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "..."
