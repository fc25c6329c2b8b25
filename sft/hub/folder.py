"""The export folder: how one is recognised, listed and checked before it is pushed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sft.utils.errors import UserError
from sft.utils.files import read_json
from sft.utils.hashes import folder_hashes

KIND = "sambay-sft export"
MANIFEST = "manifest.json"
RESULTS = ".eval_results"
"""The folder of results that are claimed, as the Hub calls it."""

# Written by hand after an export, as model cards and licences are; everything else must be what was exported.
EDITABLE = ("README.md", "LICENSE")


@dataclass(frozen=True)
class LocalFile:
    """A file of an export folder.

    Attributes:
        folder: the export folder; path: relative to it, with forward slashes.
        size: in bytes.
        sha256: hex, of the content.
    """

    folder: Path
    path: str
    size: int
    sha256: str

    def blob(self) -> str:
        """Git's SHA-1 of the content in hex, which is how the Hub names small files."""
        content = (self.folder / self.path).read_bytes()
        return hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()


def is_export(folder: Path) -> bool:
    """Whether `folder` is one that `sft export` wrote."""
    try:
        manifest = read_json(folder / MANIFEST)
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND and _names_files(manifest.get("files"))


def _names_files(files: Any) -> bool:
    """Whether a manifest's `files` says of each its SHA-256."""
    return isinstance(files, dict) and all(isinstance(file, dict) and "sha256" in file for file in files.values())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export folder.

    Raises:
        UserError: when `folder` is none.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; `sft export` makes the folder that is pushed")
    if not is_export(folder):
        raise UserError(
            f"{folder} is not a folder that `sft export` wrote (no {MANIFEST} of ours); export the run first"
        )
    return read_json(folder / MANIFEST)


def list_files(folder: Path) -> list[LocalFile]:
    """Every file of an export folder, checked against its manifest; hidden files and folders are left out.

    Raises:
        UserError: when a file is missing, or is not what was exported.
    """
    promised: dict[str, dict[str, Any]] = read_manifest(folder)["files"]
    found = {
        name: LocalFile(folder, name, (folder / name).stat().st_size, sha256)
        for name, sha256 in folder_hashes(folder, keep=False, shown=(RESULTS,)).items()
    }
    missing = sorted(set(promised) - set(found))
    if missing:
        raise UserError(f"{folder} is incomplete: {', '.join(missing)} is missing; export the run again")
    changed = [
        name for name, entry in promised.items() if name not in EDITABLE and found[name].sha256 != entry["sha256"]
    ]
    if changed:
        raise UserError(f"{folder}: {', '.join(sorted(changed))} is not what was exported; export the run again")
    return list(found.values())


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file in `folder`, for the manifest."""
    return {
        name: {"size": (folder / name).stat().st_size, "sha256": sha256}
        for name, sha256 in folder_hashes(folder, keep=False, shown=(RESULTS,)).items()
    }
