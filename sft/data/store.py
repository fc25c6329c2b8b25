"""The prepared store: one folder per content key, whole or absent.

<root>/<key>/manifest.json      what it was made from, the funnel, the shards' sizes and hashes
<root>/<key>/rows-00000.arrow   the rows that are trained on (Arrow stream, opened memory-mapped)
<root>/<key>/funnel.json        what became of the rows, step by step
<root>/.locks/<key>             held while a process builds <key>
<root>/.building-<key>          the folder being built; left behind by a kill, removed by the next run
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from sft.utils.errors import UserError, disk_full
from sft.utils.files import read_sealed, write_sealed
from sft.utils.hashes import folder_hashes

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
_BUILDING = ".building-"
_LOCKS = ".locks"
LOCK_LIMIT = 24 * 3600.0
"""Seconds to wait for another process that builds the same store."""


def find(root: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a whole store, or None. A store of which a byte is missing or changed is not whole."""
    folder = root / key
    manifest = read_sealed(folder / MANIFEST_FILE)
    if manifest is None or manifest.get("key") != key:
        return None
    shards = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    return manifest if shards.items() <= folder_hashes(folder, tuple(shards)).items() else None


@contextmanager
def locked(root: Path, key: str) -> Iterator[None]:
    """Hold the right to build `key`; a second process waits here. The kernel releases it when a process dies."""
    with writable(root):
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)
        handle = open(root / _LOCKS / key, "w")  # noqa: SIM115
    with handle:
        _wait_for_lock(handle, key)
        yield


def _wait_for_lock(handle: IO[str], key: str) -> None:
    limit = time.monotonic() + LOCK_LIMIT
    told = False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                raise UserError(f"Another process has been preparing {handle.name} for a day: end it first.") from None
            if not told:
                log.info("waiting for another process that prepares the same data (%s)", key)
            told = True
            time.sleep(0.1)


@contextmanager
def building(root: Path, key: str) -> Iterator[Path]:
    """A fresh folder to build `key` in, which the caller ends by `commit`; removed if the caller raises.

    The lock of `key` must be held. Leftovers of killed builds are removed first. Raises UserError when the disk is full
    or can't be written to.
    """
    _remove_leftovers(root, key)
    folder = root / f"{_BUILDING}{key}"
    try:
        with writable(root):
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(root: Path, key: str, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and put the built folder in its place, in one rename."""
    write_sealed(folder / MANIFEST_FILE, manifest)
    for path in (folder / name for name in os.listdir(folder)):
        _sync(path)
    _sync(folder)
    target = root / key
    if target.exists():  # not whole, or we would not have built it
        shutil.rmtree(target)
    os.rename(folder, target)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path, key: str) -> None:
    for folder in root.glob(f"{_BUILDING}*"):
        other = folder.name.removeprefix(_BUILDING)
        if other == key:
            shutil.rmtree(folder)
            continue
        with open(root / _LOCKS / other, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its builder is alive
                continue
            shutil.rmtree(folder, ignore_errors=True)


def discard(root: Path, folder: Path) -> int:
    """Remove a folder that is built under the lock of its name, unless somebody holds that; the bytes freed."""
    with open(root / _LOCKS / folder.name, "w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # it is being built
            return 0
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        # Without its manifest first: a kill in the middle must not leave what looks whole.
        (folder / MANIFEST_FILE).unlink(missing_ok=True)
        shutil.rmtree(folder)
        return size


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one sentence."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise UserError(
                f"{root}: no space left while preparing data; free some, or set `prepared_dir` to another disk."
            ) from error
        if error.filename is not None and not str(error.filename).startswith(str(root)):
            raise UserError(f"{error.filename}: {error.strerror}, while data is prepared.") from error
        raise UserError(f"{root}: prepared data can't be written there: {error}; set `prepared_dir`.") from error
