"""Hashes of files: each is read once, and no change of its content goes unnoticed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.utils import hashes
from sft.utils.hashes import CACHE, file_hash, folder_hashes


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were read to be hashed."""
    read: list[str] = []
    real = hashes.sha256_file
    monkeypatch.setattr(hashes, "sha256_file", lambda path: (read.append(Path(path).name), real(path))[1])
    return read


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a new process knows: nothing."""
    monkeypatch.setattr(hashes, "_memory", {})


def truth(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once_by_all_processes(tmp_path: Path, reads: list[str], monkeypatch) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc" * 1000)
    assert file_hash(path) == truth(path)
    forget(monkeypatch)
    assert file_hash(str(path)) == truth(path)
    assert reads == ["weights.bin"]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def flip_in_place_with_the_old_time(path: Path) -> None:
    before = path.stat()
    with open(path, "r+b") as handle:
        handle.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def replace_by_another_of_the_same_time(path: Path) -> None:
    before, other = path.stat(), path.with_name("other")
    other.write_bytes(b"z" * before.st_size)
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, path)


@pytest.mark.parametrize("change", [flip, flip_in_place_with_the_old_time, replace_by_another_of_the_same_time])
@pytest.mark.parametrize("fresh", [True, False], ids=["new process", "same process"])
def test_a_change_of_the_same_size_is_noticed(
    tmp_path: Path, change: Callable[[Path], None], fresh: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"abc" * 1000)
    before = file_hash(path)
    change(path)  # at once: within one tick of the file system's clock
    if fresh:
        forget(monkeypatch)
    assert file_hash(path) == truth(path) != before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: '{"files": {"weights.bin": 3}, "check": 4}',
        lambda text: text.replace(json.loads(text)["files"]["weights.bin"]["sha256"], "0" * 64),
        lambda text: text.replace('"files"', '"file"'),
    ],
)
def test_a_damaged_cache_counts_as_none(tmp_path: Path, damage: Callable[[str], str], monkeypatch) -> None:
    path, cache = tmp_path / "weights.bin", tmp_path / CACHE
    path.write_bytes(b"abc" * 1000)
    file_hash(path)
    forget(monkeypatch)
    cache.write_text(damage(cache.read_text()))
    assert file_hash(path) == truth(path)
    assert json.loads(cache.read_text())["files"]["weights.bin"]["sha256"] == truth(path)


def test_a_copied_cache_isn_t_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "weights.bin").write_bytes(b"abc")
    file_hash(first / "weights.bin")
    shutil.copytree(first, second)
    flip_in_place_with_the_old_time(second / "weights.bin")
    forget(monkeypatch)
    assert file_hash(second / "weights.bin") == truth(second / "weights.bin")


def test_a_folder_that_can_t_be_written_is_hashed_once_a_process(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")

    def refused(path: object, value: object) -> None:
        raise PermissionError(path)

    monkeypatch.setattr(hashes, "write_json", refused)
    assert file_hash(tmp_path / "weights.bin") == file_hash(tmp_path / "weights.bin") == truth(tmp_path / "weights.bin")
    assert reads == ["weights.bin"] and not (tmp_path / CACHE).exists()


def test_a_folder_that_is_published_gets_no_cache(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")
    for _ in range(2):
        assert file_hash(tmp_path / "weights.bin", keep=False) == folder_hashes(tmp_path, keep=False)["weights.bin"]
    assert reads == ["weights.bin"] and not (tmp_path / CACHE).exists()


def test_a_cache_s_place_taken_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")
    (tmp_path / CACHE).mkdir()
    assert file_hash(tmp_path / "weights.bin") == truth(tmp_path / "weights.bin")


def test_the_files_of_a_folder(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "inner").mkdir()
    for name in ("b.safetensors", "a.safetensors", "config.json", "inner/c.json", ".hidden"):
        (tmp_path / name).write_text(name)
    every = folder_hashes(tmp_path)
    assert list(every) == ["a.safetensors", "b.safetensors", "config.json", "inner/c.json"]
    assert every == {name: truth(tmp_path / name) for name in every}
    forget(monkeypatch)
    chosen = folder_hashes(tmp_path, ("config.json", "*.safetensors", "*.json"))
    assert list(chosen) == ["a.safetensors", "b.safetensors", "config.json"]
    assert sorted(reads) == sorted(Path(name).name for name in every)
    (tmp_path / "a.safetensors").unlink()
    flip(tmp_path / "config.json")
    assert list(folder_hashes(tmp_path)) == ["b.safetensors", "config.json", "inner/c.json"]
    assert list(json.loads((tmp_path / CACHE).read_text())["files"]) == ["b.safetensors", "config.json"]


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        file_hash(tmp_path / "gone")
