"""Checkpoints that count only when whole: a marker with every file's hash is written last, older ones go after it."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.utils.errors import RestartError
from sft.utils.files import flush, read_sealed, sha256_file, write_sealed
from sft.utils.say import say

MARKER = "complete.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its step, its folder and what its marker says."""

    step: int
    path: Path
    marker: dict[str, Any]


def write_marker(
    folder: Path,
    *,
    step: int,
    identity: Mapping[str, Any],
    counters: Mapping[str, Any],
    ran_on: Mapping[str, Any] | None = None,
) -> None:
    """Declare `folder` a whole checkpoint: flush all its files to disk, then write the marker.

    `identity`: what is trained, which whoever goes on has to train too; `ran_on`: on what, which may be another then.
    """
    marker = folder / MARKER
    marker.unlink(missing_ok=True)
    files: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        flush(path)
        if path.is_file():
            files[path.relative_to(folder).as_posix()] = sha256_file(path)
    flush(folder)
    flush(folder.parent)
    content = {"identity": dict(identity), "ran_on": dict(ran_on or {}), "counters": dict(counters), "files": files}
    write_sealed(marker, {"step": step, **content})


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The folder's marker if every file it lists is there, byte for byte as it was written, else None."""
    marker = read_sealed(folder / MARKER)
    if marker is None or marker["step"] != _step(folder):
        return None
    try:
        # The files are read, not trusted for their dates: a resume reads them anyway.
        whole = all(sha256_file(folder / name) == written for name, written in marker["files"].items())
    except OSError:
        return None
    return marker if whole else None


def checkpoint_folders(stage_dir: Path) -> list[tuple[int, Path]]:
    """All `checkpoint-N`, whole or not, by step."""
    found = [(step, path) for path in stage_dir.glob("checkpoint-*") if (step := _step(path)) is not None]
    return sorted(found)


def _step(path: Path) -> int | None:
    match = re.fullmatch(r"checkpoint-(\d+)", path.name)
    return int(match[1]) if match else None


def resumable(stage_dir: Path, identity: Mapping[str, Any], *, remove_broken: bool = True) -> Checkpoint | None:
    """The newest whole checkpoint, to go on from; None when there is none.

    Half-written ones, and damaged ones that are newer, are removed when asked; that a damaged one isn't used is said.
    Raises UserError when the newest whole one was made by another recipe or of other data: going on would mix two runs.
    """
    damaged: list[str] = []
    newest: Checkpoint | None = None
    for step, path in reversed(checkpoint_folders(stage_dir)):
        marked = os.path.lexists(path / MARKER)
        if newest is None and marked:
            marker = read_marker(path)
            if marker is not None:
                newest = Checkpoint(step, path, marker)
                continue
            damaged.append(path.name)
        elif marked:
            continue  # older than needed: kept as it is
        if remove_broken:
            remove(path)
    if damaged and remove_broken:
        instead = f"going on from {newest.path.name}" if newest else "starting from the beginning"
        say(f"{stage_dir}: {', '.join(damaged)} is damaged, {instead}")
    if newest is None:
        return None
    difference = describe_difference(newest.marker["identity"], identity)
    if difference:
        raise RestartError(
            f"{newest.path} can't be continued: {difference}. Put the recipe back as it was, start the stage again "
            f"with --restart {identity.get('stage', stage_dir.name)}, or choose another output_dir."
        )
    return newest


def newest_whole(stage_dir: Path, before: int) -> Path | None:
    """The newest whole checkpoint of a step before `before`."""
    older = [path for step, path in reversed(checkpoint_folders(stage_dir)) if step < before]
    return next((path for path in older if read_marker(path) is not None), None)


def rotate(stage_dir: Path, limit: int | None, keep: Collection[int] = ()) -> None:
    """Delete the oldest whole checkpoints until `limit` are left (None: keep all).

    The newest is what a resume goes on from, and those of the steps in `keep` are still wanted: both stay, even if
    there is one more than `limit` then.
    """
    if limit is None:
        return
    whole = [(step, path) for step, path in checkpoint_folders(stage_dir) if (path / MARKER).exists()]
    spare = [path for step, path in whole[:-1] if step not in keep]
    for path in spare[: max(0, len(whole) - limit)]:
        # Without its marker first: a kill in the middle must not leave a folder that looks whole.
        (path / MARKER).unlink()
        remove(path)


OPTIMIZER = ("optimizer.pt", "scheduler.pt", "rng_state*", "global_step*", "latest", "zero_to_fp32.py")
"""What only a resume needs of a checkpoint, by patterns of names."""


def keep_weights_only(stage_dir: Path) -> None:
    """Remove what only a resume needs from the checkpoints of a stage that is done."""
    for _, folder in checkpoint_folders(stage_dir):
        marker = read_sealed(folder / MARKER)
        if marker is None:
            remove(folder)  # half written
            continue
        spare = [path for pattern in OPTIMIZER for path in folder.glob(pattern)]
        gone = {path.relative_to(folder).parts[0] for path in spare}
        files = {name: found for name, found in marker["files"].items() if name.partition("/")[0] not in gone}
        # The marker first: files beside those that it lists do no harm, and missing ones would.
        write_sealed(folder / MARKER, {**marker, "files": files, "weights_only": True})
        for path in spare:
            remove(path)


def remove(path: Path) -> None:
    """Remove what stands in a checkpoint's place, be it a folder, a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
