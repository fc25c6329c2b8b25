"""Files and folders that are replaced: the old content or the new, whatever kills the writer, and nothing beside it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.utils import files
from sft.utils.files import atomic_folder, atomic_open, recover_folder, scratch_folder, write_text

DEAD = 999_999_999
SYSTEM_CALLS = ("fsync", "replace", "open", "mkdir", "unlink", "rmdir")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def fill(folder: Path, text: str) -> None:
    (folder / "inner").mkdir()
    for name in ("a", "b", "inner/c"):
        (folder / name).write_text(text)


def content(folder: Path) -> set[str]:
    """What the folder's files hold: one text, if it is whole."""
    assert names(folder) == ["a", "b", "inner"] and names(folder / "inner") == ["c"]
    return {(folder / name).read_text() for name in ("a", "b", "inner/c")}


def put(target: Path, text: str) -> None:
    with atomic_folder(target) as folder:
        fill(folder, text)


def killed_at(call: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that is killed at its n-th system call; whether it got so far."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., object]) -> Callable[..., object]:
            def run(*args: object, **kwargs: object) -> object:
                nonlocal count
                count += 1
                if count == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return run

        try:
            for name in SYSTEM_CALLS:
                setattr(os, name, counted(getattr(os, name)))
            files._swapped = counted(files._swapped)  # type: ignore[assignment]
            work()
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]  # bounded: the child ends itself
    return os.waitstatus_to_exitcode(status) == -signal.SIGKILL


@pytest.mark.parametrize("swaps", [True, False], ids=["swapped", "two renames"])
@pytest.mark.parametrize("exists", [True, False], ids=["over an old one", "new"])
def test_a_kill_at_any_moment_leaves_one_whole_folder(
    tmp_path: Path, swaps: bool, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not swaps:
        monkeypatch.setattr(files, "_swapped", lambda one, other: False)
    moments = 0
    for moment in range(1, 200):
        target = tmp_path / str(moment) / "folder"
        target.parent.mkdir()
        if exists:
            put(target, "old")
        if not killed_at(moment, lambda target=target: put(target, "new")):
            break
        moments += 1
        if swaps and exists:
            assert content(target) in ({"old"}, {"new"})
        recover_folder(target)
        found = content(target) if target.exists() else set()
        assert found in (({"old"}, {"new"}) if exists else (set(), {"new"}))
        assert names(target.parent) == (["folder"] if found else [])
        put(target, "newer")
        assert content(target) == {"newer"} and names(target.parent) == ["folder"]
    assert content(target) == {"new"} and names(target.parent) == ["folder"]
    assert moments > 8


def test_a_kill_at_any_moment_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    target, moments = tmp_path / "file", 0
    for moment in range(1, 50):
        write_text(target, "old")
        if not killed_at(moment, lambda: write_text(target, "new")):
            break
        moments += 1
        assert target.read_text() in ("old", "new")
        write_text(target, "newer")
        assert target.read_text() == "newer" and names(tmp_path) == ["file"]
    assert moments > 2


def test_only_the_temporaries_of_dead_writers_go(tmp_path: Path) -> None:
    mine = [f".file.{DEAD}.tmp", f".x[1].tmp-{DEAD}"]
    others = [f".file2.{DEAD}.tmp", ".file.1.tmp", ".file.note.tmp", f".x1.tmp-{DEAD}", ".x[1].tmp-1", ".x[1].tmp-mine"]
    for name in [*mine, *others]:
        path = tmp_path / name
        path.mkdir() if "tmp-" in name else path.touch()
    write_text(tmp_path / "file", "text")
    put(tmp_path / "x[1]", "new")
    assert names(tmp_path) == sorted([*others, "file", "x[1]"])


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    put(tmp_path / "folder", "old")
    write_text(tmp_path / "file", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as folder:
        fill(folder, "new")
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="full"), atomic_open(tmp_path / "file") as handle:
        handle.write("new")
        raise OSError("full")
    assert content(tmp_path / "folder") == {"old"} and (tmp_path / "file").read_text() == "old"
    assert names(tmp_path) == ["file", "folder"]


def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their folders, then the rename, then the folder that holds the name."""
    done: list[str] = []
    flushed, put_in_place = files.flush, files._put_in_place
    monkeypatch.setattr(files, "flush", lambda path: (done.append(path.name), flushed(path)))
    monkeypatch.setattr(files, "_put_in_place", lambda *paths: (done.append("rename"), put_in_place(*paths)))
    put(tmp_path / "folder", "new")
    temporary = f".folder.tmp-{os.getpid()}"
    assert set(done[:4]) == {"a", "b", "c", "inner"} and done[4:] == [temporary, "rename", tmp_path.name]
    done.clear()
    write_text(tmp_path / "file", "new")
    assert done == [tmp_path.name]


def test_a_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    put(tmp_path / "disk" / "folder", "old")
    (tmp_path / "folder").symlink_to(tmp_path / "disk" / "folder")
    put(tmp_path / "folder", "new")
    assert (tmp_path / "folder").is_symlink() and content(tmp_path / "folder") == {"new"}
    assert names(tmp_path) == ["disk", "folder"] and names(tmp_path / "disk") == ["folder"]


def test_a_file_in_the_folder_s_place_stays(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("mine")
    with pytest.raises(NotADirectoryError):
        put(tmp_path / "folder", "new")
    assert (tmp_path / "folder").read_text() == "mine" and names(tmp_path) == ["folder"]


def test_a_scratch_folder_is_empty_and_goes(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / "export") as scratch:
        fill(scratch, "x")
        assert scratch.parent == tmp_path
    assert not names(tmp_path)
