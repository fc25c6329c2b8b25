"""The store is whole or absent: killed at any moment, made by two at once, on a full disk, cut afterwards."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import data_toys
import pytest

from sft.data import store
from sft.data.prepare import PreparedStage, prepare_stage
from sft.utils.errors import UserError
from sft.utils.files import SEAL

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]
TRAIN = {"max_length": 256, "packing": True}
FORK = multiprocessing.get_context("fork")


def _rows(count: int) -> list[Any]:
    good = [{"prompt": f"what is {i}?", "completion": "x" * (1 + i * 37 % 300)} for i in range(count)]
    return [*good, "{broken"]


def _contents(folder: Path) -> dict[str, Any]:
    """The files' hashes; of those that say how long it took, all but that."""
    files = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
    hashes = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.suffix == ".arrow"}
    return hashes | {path.name: _timeless(json.loads(path.read_text())) for path in files if path.suffix == ".json"}


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in ("seconds", SEAL)}
    return [_timeless(item) for item in value] if isinstance(value, list) else value


def _names(root: Path) -> list[str]:
    """What is there beside what a next run goes on from."""
    return sorted(path.name for path in root.iterdir() if path.name not in (".locks", "steps"))


@pytest.fixture
def source(write_rows: Write) -> Path:
    return write_rows(_rows(2000))


def test_killed_at_any_moment_then_prepared_again(prepare: Prepare, source: Path, tmp_path: Path, toy: Any) -> None:
    straight = prepare(source, train=TRAIN, out=tmp_path / "straight")
    start = time.monotonic()
    prepare(source, train=TRAIN, out=tmp_path / "timed")
    seconds = time.monotonic() - start
    root = tmp_path / "killed" / "prepared"
    moments = random.Random(0)
    for _ in range(10):
        child = FORK.Process(target=prepare, args=(source,), kwargs={"train": TRAIN, "out": tmp_path / "killed"})
        child.start()
        time.sleep(moments.uniform(0, seconds))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join(60)
        names = _names(root) if root.exists() else []
        assert set(names) <= {f".building-{straight.manifest['key']}", straight.manifest["key"]}
        if straight.manifest["key"] in names:
            shutil.rmtree(root / straight.manifest["key"])
    again = prepare(source, train=TRAIN, out=tmp_path / "killed")
    assert _contents(again.path) == _contents(straight.path)
    assert _names(root) == [straight.manifest["key"]]


def _die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _die_at(prepare: Prepare, source: Path, out: Path, moment: str) -> None:
    if moment == "before the rename":
        rename = os.rename
        os.rename = lambda old, new: _die() if ".building-" in str(old) else rename(old, new)
    if moment == "before the manifest":
        store.write_sealed = _die
    prepare(source, train=TRAIN, out=out, progress=lambda phase, *_: _die() if phase == moment else None)


@pytest.mark.parametrize("moment", ["packs", "before the manifest", "before the rename"])
def test_killed_midway_leaves_a_folder_that_the_next_run_removes(
    prepare: Prepare, source: Path, tmp_path: Path, moment: str
) -> None:
    straight = prepare(source, train=TRAIN, out=tmp_path / "straight")
    root = tmp_path / "killed" / "prepared"
    child = FORK.Process(target=_die_at, args=(prepare, source, tmp_path / "killed", moment))
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert _names(root) == [f".building-{straight.manifest['key']}"]
    assert _contents(prepare(source, train=TRAIN, out=tmp_path / "killed").path) == _contents(straight.path)
    assert _names(root) == [straight.manifest["key"]]


def test_waiting_for_another_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "LOCK_LIMIT", 0.2)
    refused = pytest.raises(UserError, match=r"preparing .*key for a day: end it first")
    with store.locked(tmp_path, "key"), refused, store.locked(tmp_path, "key"):
        pytest.fail("two hold the lock")
    with store.locked(tmp_path, "key"):
        pass


def test_two_processes_at_once(prepare: Prepare, source: Path, tmp_path: Path) -> None:
    started = FORK.Barrier(2)

    def run() -> None:
        started.wait(60)
        prepare(source, train=TRAIN, out=tmp_path / "shared")

    children = [FORK.Process(target=run) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    alone = prepare(source, train=TRAIN, out=tmp_path / "alone")
    assert _names(tmp_path / "shared" / "prepared") == [alone.manifest["key"]]
    assert _contents(tmp_path / "shared" / "prepared" / alone.manifest["key"]) == _contents(alone.path)


def test_a_fresh_interpreter_makes_the_same_bytes(prepare: Prepare, source: Path, tmp_path: Path) -> None:
    here = prepare(source, train=TRAIN, max_bad_fraction=1.0)
    subprocess.run(
        [sys.executable, data_toys.__file__, str(source), str(tmp_path / "there"), "256", "1"], check=True, timeout=120
    )
    assert _contents(tmp_path / "there" / "prepared" / here.manifest["key"]) == _contents(here.path)


def test_leftovers_of_other_killed_builds_are_removed_but_not_of_living_ones(
    prepare: Prepare, source: Path, tmp_path: Path
) -> None:
    from sft.data.store import locked

    root = tmp_path / "out" / "prepared"
    (root / ".locks").mkdir(parents=True)
    for name in ("dead", "living"):
        (root / f".building-{name}").mkdir()
    with locked(root, "living"):
        key = prepare(source, train=TRAIN).manifest["key"]
        assert _names(root) == sorted([".building-living", key])


def test_a_damaged_store_is_made_again(prepare: Prepare, source: Path) -> None:
    first = prepare(source, train=TRAIN)
    before = _contents(first.path)
    shard = first.path / first.manifest["shards"][0]["name"]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert _contents(prepare(source, train=TRAIN).path) == before
    (first.path / "manifest.json").write_text("{")
    assert _contents(prepare(source, train=TRAIN).path) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KB; skips where mounting isn't allowed."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    allowed = os.geteuid() == 0 and shutil.which("mount") is not None
    if not allowed or subprocess.run(mount, capture_output=True, timeout=60).returncode != 0:
        pytest.skip("a small tmpfs can't be mounted here (needs root); the file size limit test covers the same path")
    yield folder
    subprocess.run(["umount", str(folder)], check=True, timeout=60)


@pytest.mark.parametrize("packing", [False, True])
def test_full_disk(prepare: Prepare, source: Path, small_disk: Path, packing: bool) -> None:
    with pytest.raises(UserError, match="no space left"):
        prepare(source, train={**TRAIN, "packing": packing}, out=small_disk)
    assert _names(small_disk / "prepared") == []


def test_full_disk_with_bad_rows(prepare: Prepare, write_rows: Write, small_disk: Path) -> None:
    with pytest.raises(UserError, match="no space left"):
        prepare(write_rows(["{" * 200] * 2000), out=small_disk, max_bad_fraction=1.0)
    assert _names(small_disk / "prepared") == []


def _limited(prepare: Prepare, source: Path, out: Path, told: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    try:
        prepare(source, train=TRAIN, out=out)
    except UserError as error:
        told.send(str(error))


def test_file_size_limit(prepare: Prepare, source: Path, tmp_path: Path) -> None:
    told, end = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_limited, args=(prepare, source, tmp_path / "limited", end))
    child.start()
    child.join(60)
    assert child.exitcode == 0 and told.poll()
    assert "no space left" in told.recv()  # bounded: there is something to receive
    assert _names(tmp_path / "limited" / "prepared") == []


def test_place_that_cannot_be_written_is_said(prepare: Prepare, source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written there.*prepared_dir"):
        prepare(source, out=tmp_path / "file")


def test_ctrl_c_leaves_nothing(prepare: Prepare, source: Path, tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(source, train=TRAIN, progress=interrupt)
    assert _names(tmp_path / "out" / "prepared") == []
    assert prepare(source, train=TRAIN).manifest["funnel"]["kept"] > 1500


def test_prepared_dir_is_used_and_shared(source: Path, tmp_path: Path, toy: Any) -> None:
    made = []
    for out in ("one", "two"):
        recipe = data_toys.stage_of([{"path": str(source)}], tmp_path / out, TRAIN, {})
        recipe.prepared_dir = str(tmp_path / "cache")
        made.append(prepare_stage(recipe, recipe.stages[0], toy).path)
    assert made[0] == made[1] and made[0].parent == tmp_path / "cache"
    assert not (tmp_path / "two").exists()
