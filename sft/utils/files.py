"""Files and folders that matter: written under a temporary name beside the target, flushed to disk, and renamed."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from sft.utils.errors import UserError

SEAL = "sha256_of_this"
"""The key under which a sealed file holds the hash of all its other keys."""


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it either gets the whole content or stays as it was.

    A kill at any moment leaves the old file, and a temporary one that the next writer of `path` removes; a full disk
    raises and leaves the old file too. Raises UserError where a folder stands in the file's place.
    """
    target = Path(path)
    _refuse_folder(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in _leftovers(target, r"\.(\d+)\.tmp"):
        left.unlink(missing_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
        flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class PartFile:
    """A file that a writer of some library fills bit by bit, under a temporary name until `finish`.

    A subclass sets `_writer`, which has `close`, and has `_flush` write what is pending (and open it, if it isn't yet).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.temporary = path.with_name(f".{path.name}.tmp")
        self._writer: Any = None

    def _flush(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Write what is left, bring it to disk, and give the file its name."""
        self._flush()
        self._writer.close()
        flush(self.temporary)
        os.replace(self.temporary, self.path)

    def abandon(self) -> None:
        """Leave nothing behind."""
        if self._writer is not None:
            with suppress(OSError):  # what it can't write isn't wanted
                self._writer.close()
        self.temporary.unlink(missing_ok=True)


def remove_file(path: Path) -> None:
    """Remove a file that may be there. Raises UserError where a folder stands in its place."""
    _refuse_folder(path)
    path.unlink(missing_ok=True)


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise UserError(f"{path} is a folder where a file belongs: move it away, and give the same command again.")


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """An empty folder to fill, that takes the place of `path` at the end; an error inside leaves `path` as it was.

    A kill at any moment leaves the old folder or the new one, whole. (Where the file system can't swap two folders, it
    may leave the old one under another name: `recover_folder` puts it back, and the next writer calls that.)
    """
    target = Path(os.path.realpath(path))
    with scratch_folder(target) as temporary:
        yield temporary
        for inner in (*temporary.rglob("*"), temporary):
            if not inner.is_symlink():
                flush(inner)
        _put_in_place(temporary, target)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside `target`, on the same disk, that is gone afterwards; those of killed processes go too."""
    recover_folder(target)
    scratch = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def recover_folder(target: Path) -> None:
    """Put right what killed writers of the folder `target` left beside it: what it held comes back, the rest goes."""
    if not target.parent.is_dir():
        return
    previous = _previous(target)
    if previous.exists() and not target.exists():
        os.replace(previous, target)
    for left in (previous, *_leftovers(target, r"\.tmp-(\d+)")):
        shutil.rmtree(left, ignore_errors=True)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # file systems without a disk below them
            raise
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; what was there is thrown away once the new one is on the disk."""
    previous = _previous(target)
    if not target.is_dir():
        os.replace(temporary, target)
    elif not _swapped(temporary, target):
        os.replace(target, previous)
        os.replace(temporary, target)
    flush(target.parent)
    shutil.rmtree(previous, ignore_errors=True)


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.old")


def _swapped(one: Path, other: Path) -> bool:
    """Whether two folders could be given each other's names in one step, as Linux can on most file systems."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _leftovers(target: Path, suffix: str) -> list[Path]:
    """Temporaries of `target` whose writers are dead: `.<name><suffix>`, where the suffix's group is a process id."""
    pattern = re.compile(re.escape(f".{target.name}") + suffix)
    found = [(match, entry) for entry in os.scandir(target.parent) if (match := pattern.fullmatch(entry.name))]
    return [Path(entry.path) for match, entry in found if not _alive(int(match[1]))]


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_open(path) as handle:
        handle.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def unwritable(folder: str | os.PathLike[str]) -> str | None:
    """Why nothing could be written below `folder`, be it there or still to be made; None where it could.

    It is tried: what a system's flags say of a folder isn't what its file system lets happen. Nothing is left behind.
    """
    path = Path(folder).expanduser().absolute()
    there = next(at for at in (path, *path.parents) if os.path.lexists(at))
    if not there.is_dir():
        return f"{there} is no folder"
    try:
        with tempfile.TemporaryDirectory(dir=there, prefix=".sft-"):
            return None
    except OSError as error:
        return error.strerror or str(error)


def check_writable(folder: str | os.PathLike[str], remedy: str) -> None:
    """Raise UserError, with what to do, where nothing could be written below `folder`."""
    if why := unwritable(folder):
        raise UserError(f"{folder} can't be written to ({why}): {remedy}.")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The JSON value that `path` holds."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def sha256_file(path: str | os.PathLike[str]) -> str:
    """The hex SHA-256 of the file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def sha256_json(value: Any) -> str:
    """The hex SHA-256 of `value` as canonical JSON (sorted keys, no spaces): a content key."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_sealed(path: str | os.PathLike[str], value: dict[str, Any]) -> None:
    """Write `value` as JSON with a hash of itself in it, so that a reader notices one changed byte."""
    write_json(path, {**value, SEAL: sha256_json(value)})


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What `write_sealed` wrote; None when there is nothing, or not that: cut, changed, or of another hand."""
    try:
        value = read_json(path)
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(value, dict) or value.pop(SEAL, None) != sha256_json(value):
        return None
    return value
