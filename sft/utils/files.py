"""Files that matter: written to a temporary name beside the target, flushed to disk, and renamed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

SEAL = "sha256_of_this"
"""The key under which a sealed file holds the hash of all its other keys."""


@contextmanager
def atomic_open(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open `path` for writing so that it either gets the whole content or stays as it was.

    A kill at any moment leaves the old file; a full disk raises and leaves the old file too.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically."""
    with atomic_open(path) as handle:
        handle.write(text)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON to `path` atomically. NaN and infinities raise ValueError."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


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
