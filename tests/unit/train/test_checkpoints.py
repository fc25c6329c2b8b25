"""A checkpoint counts only when whole; the newest whole one is found; another recipe's is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft.train.callbacks import truncate_metrics
from sft.train.checkpoints import MARKER, describe_difference, read_marker, resumable, rotate, write_marker
from sft.utils.errors import UserError

IDENTITY = {"stage": "one", "seed": 1, "train": {"learning_rate": 1e-3}}


def make(stage_dir: Path, step: int, *, whole: bool = True) -> Path:
    """A checkpoint folder with a small and a nested file."""
    folder = stage_dir / f"checkpoint-{step}"
    (folder / "nested").mkdir(parents=True)
    (folder / "weights.bin").write_bytes(bytes(range(100)))
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


@pytest.mark.parametrize("damage", ["cut", "gone", "changed", "marker cut", "marker of another kind"])
def test_a_damaged_checkpoint_does_not_count(tmp_path, damage):
    folder = make(tmp_path, 5)
    assert read_marker(folder) is not None
    weights, marker = folder / "weights.bin", folder / MARKER
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:50])
    elif damage == "gone":
        weights.unlink()
    elif damage == "changed":
        weights.write_bytes(bytes(100))
    elif damage == "marker cut":
        marker.write_text(marker.read_text()[:20])
    else:
        marker.write_text("[]")
    assert read_marker(folder) is None
    assert resumable(tmp_path, IDENTITY) is None and not folder.exists()


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


def test_metrics_after_the_checkpoint_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2, 3, 4)]
    path.write_text("\n".join(lines) + '\n{"step": 5, "lo')
    truncate_metrics(path, 2)
    assert path.read_text() == "\n".join(lines[:2]) + "\n"
    truncate_metrics(tmp_path / "none.jsonl", 2)
