"""A checkpoint counts only when whole; the newest whole one is found; another recipe's is refused."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sft.train.callbacks import write_metrics
from sft.train.checkpoints import MARKER, describe_difference, read_marker, resumable, rotate, write_marker
from sft.utils.errors import UserError

IDENTITY = {"stage": "one", "seed": 1, "train": {"learning_rate": 1e-3}}


def make(stage_dir: Path, step: int, *, whole: bool = True) -> Path:
    """A checkpoint folder with a small and a nested file."""
    folder = stage_dir / f"checkpoint-{step}"
    (folder / "nested").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(256)) * 5000)
    (folder / "nested/state.json").write_text("{}")
    if whole:
        write_marker(folder, step=step, identity=IDENTITY, counters={"tokens": 10 * step})
    return folder


def test_the_newest_whole_one_is_found_and_half_written_ones_go(tmp_path):
    make(tmp_path, 9)
    make(tmp_path, 10)
    half = make(tmp_path, 11, whole=False)
    found = resumable(tmp_path, IDENTITY)
    assert found is not None and found.step == 10 and found.marker["counters"] == {"tokens": 100}
    assert not half.exists() and (tmp_path / "checkpoint-9").exists()


def test_nothing_to_resume(tmp_path):
    assert resumable(tmp_path, IDENTITY) is None
    assert resumable(tmp_path / "never made", IDENTITY) is None


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file, and put its times back."""
    stat = path.stat()
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def damage_file(path: Path, how: str) -> None:
    if how == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "flipped":
        flip(path, path.stat().st_size // 2)
    elif how == "gone":
        path.unlink()
    elif how == "a list":
        path.write_text("[]")
    elif how == "foreign":
        path.write_text('{"step": 5, "files": {}}')
    else:
        path.unlink()
        path.mkdir()


HOW = ["cut", "emptied", "flipped", "gone", "a list", "foreign", "a folder"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["weights.bin", "nested/state.json", MARKER])
def test_a_damaged_checkpoint_is_not_used_and_the_one_before_is(tmp_path, capsys, name, how):
    """Also where it is over a megabyte, and by one bit."""
    make(tmp_path, 4)
    folder = make(tmp_path, 5)
    assert read_marker(folder) is not None
    damage_file(folder / name, how)
    assert read_marker(folder) is None
    found = resumable(tmp_path, IDENTITY)
    assert found is not None and found.step == 4 and not folder.exists()
    # One whose marker is gone is what a kill leaves; nothing is wrong then.
    told = "" if (name, how) == (MARKER, "gone") else "checkpoint-5 is damaged, going on from checkpoint-4\n"
    err = capsys.readouterr().err
    assert err.endswith(told) if told else err == ""
    damage_file(tmp_path / "checkpoint-4" / name, how)
    assert resumable(tmp_path, IDENTITY) is None
    if told:
        assert "checkpoint-4 is damaged, starting from the beginning" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["file", "link", "dangling link"])
def test_what_stands_in_a_checkpoints_place_goes(tmp_path, kind):
    make(tmp_path, 4)
    elsewhere = tmp_path / "elsewhere"
    place = tmp_path / "checkpoint-7"
    if kind == "file":
        place.write_text("x")
    else:
        place.symlink_to(elsewhere)
    if kind == "link":
        elsewhere.mkdir()
    found = resumable(tmp_path, IDENTITY)
    assert found is not None and found.step == 4
    assert not place.is_symlink() and not place.exists() and elsewhere.exists() == (kind == "link")


def test_half_written_ones_of_any_age_go(tmp_path):
    old, new = make(tmp_path, 1, whole=False), make(tmp_path, 2)
    assert resumable(tmp_path, IDENTITY).path == new and not old.exists()


def test_broken_ones_are_left_alone_by_processes_that_do_not_own_them(tmp_path):
    folder = make(tmp_path, 5, whole=False)
    assert resumable(tmp_path, IDENTITY, remove_broken=False) is None
    assert folder.exists()


def test_another_recipes_checkpoint_is_refused_in_a_sentence(tmp_path):
    make(tmp_path, 5)
    other = {**IDENTITY, "train": {"learning_rate": 2e-3}}
    with pytest.raises(UserError, match=r"checkpoint-5 can't be continued: train\.learning_rate was 0\.001, is now 0"):
        resumable(tmp_path, other)


def test_rotation_keeps_the_newest(tmp_path):
    for step in (1, 2, 10):
        make(tmp_path, step)
    rotate(tmp_path, None)
    rotate(tmp_path, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-10", "checkpoint-2"]


def test_differences_in_words():
    assert describe_difference({"a": 1}, {"a": 1}) == ""
    assert describe_difference({"a": {"b": 1}}, {"a": {}}) == "a.b was 1, is now not set"
    many = describe_difference(dict.fromkeys("abcde", 1), dict.fromkeys("abcde", 2))
    assert many == "a was 1, is now 2, b was 1, is now 2, c was 1, is now 2 and 2 more"


def test_metrics_begin_with_the_checkpoints_log(tmp_path):
    """Whatever lay there: lines of later steps, a line cut in half, other values, a folder (which is named)."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 9.0}\n{"step": 5, "lo')
    log = [{"loss": 1.0, "epoch": 0.5, "step": 1}, {"train_runtime": 3.0, "step": 1}, {"loss": 0.5, "step": 2}]
    write_metrics(path, log)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [log[0], log[2]]
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl is a folder where a file belongs: move it away"):
        write_metrics(path, log)
