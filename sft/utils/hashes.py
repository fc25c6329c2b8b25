"""SHA-256 of files that matter, each read once: kept beside the file, and trusted while its state is the same."""

from __future__ import annotations

import os
import time
from collections.abc import Container, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_file, sha256_json, write_json

CACHE = ".sft-hashes"
"""The file in each folder that holds its files' hashes, as JSON. Hidden, without a suffix that a glob would take."""

TICK = 20_000_000
"""Nanoseconds in which a file may change twice and look the same: the clock of a file system moves in steps."""

State = dict[str, int]

_memory: dict[Path, tuple[State, str]] = {}


def file_hash(path: str | os.PathLike[str], *, keep: bool = True) -> str:
    """The hex SHA-256 of a file; read again only when its size, times or inode have changed.

    `keep`: note it beside the file for other processes; False leaves the folder as it is, and this process remembers.

    Raises:
        OSError: when the file can't be read.
    """
    path = Path(path)
    return _hashes(path.parent, [path.name], keep)[path.name]


def folder_hashes(
    folder: str | os.PathLike[str],
    patterns: Sequence[str] = ("**/*",),
    *,
    keep: bool = True,
    shown: Container[str] = (),
) -> dict[str, str]:
    """Name -> hex SHA-256 of the files in `folder` that match a glob pattern, sorted; hidden ones are left out.

    Names are relative to `folder`, with forward slashes. `keep`: see `file_hash`. `shown`: names that begin with a dot
    and aren't hidden.
    """
    folder = Path(folder)
    found: dict[Path, set[str]] = {}
    for path in (path for pattern in patterns for path in folder.glob(pattern)):
        parts = path.relative_to(folder).parts
        if path.is_file() and not any(part.startswith(".") and part not in shown for part in parts):
            found.setdefault(path.parent, set()).add(path.name)
    hashes = {
        (parent / name).relative_to(folder).as_posix(): value
        for parent, names in found.items()
        for name, value in _hashes(parent, sorted(names), keep).items()
    }
    return dict(sorted(hashes.items()))


def _hashes(folder: Path, names: Iterable[str], keep: bool) -> dict[str, str]:
    """The hashes of some of a folder's files; its cache is read once, and written once where it has changed."""
    known, found, changed = _read_cache(folder), {}, False
    for name in names:
        path = folder / name
        state = _state(path)
        if name in known and known[name][0] == state:
            found[name] = known[name][1]
            continue
        settled = _settle(state)
        found[name] = sha256_file(path)
        if settled and _state(path) == state:
            known[name], changed = (state, found[name]), True
            _memory[path.absolute()] = known[name]
    if changed and keep:
        _write_cache(folder, known)
    return found


def _state(path: Path) -> State:
    """What changes with a file's content. ctime can't be set back, as mtime can."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns, "inode": stat.st_ino}


def _settle(state: State) -> bool:
    """Wait until a change from now on would show in the times; False where the file's clock isn't this machine's."""
    age = time.time_ns() - state["ctime_ns"]
    if 0 <= age < TICK:
        time.sleep((TICK - age) / 1e9)
    return age >= 0


def _read_cache(folder: Path) -> dict[str, tuple[State, str]]:
    """What is known of a folder's files; a cache that is absent or damaged knows nothing."""
    known = {path.name: entry for path, entry in _memory.items() if path.parent == folder.absolute()}
    try:
        cache: Any = read_json(folder / CACHE)
        if cache["check"] == sha256_json(cache["files"]):
            known |= {name: (entry["state"], entry["sha256"]) for name, entry in cache["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    return known


def _write_cache(folder: Path, known: dict[str, tuple[State, str]]) -> None:
    """Note the hashes of the files that are still there. In a folder that can't be written to, memory has to do."""
    files = {
        name: {"state": state, "sha256": value} for name, (state, value) in known.items() if (folder / name).exists()
    }
    with suppress(OSError, UserError):
        write_json(folder / CACHE, {"files": files, "check": sha256_json(files)})
