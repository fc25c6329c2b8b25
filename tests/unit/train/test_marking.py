"""A checkpoint is marked whole beside the steps after it: they go on, nothing overtakes it, its faults are told."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
from train_toys import train_toy

from sft.train import trainer
from sft.train.checkpoints import read_marker, write_marker
from sft.train.marking import Marking
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError

LIMIT = 60.0


def markers(stage: Path) -> dict[int, bool]:
    """Whether each checkpoint there is whole, by step."""
    return {int(path.name.split("-")[1]): read_marker(path) is not None for path in stage.glob("checkpoint-*")}


def test_steps_go_on_while_a_checkpoint_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What marks the one of step 2 waits for step 4, which would never come if steps waited for what marks it."""
    step_4, waited, original = threading.Event(), [], SambayTrainer.training_step
    stage = tmp_path / "stages/one"

    def marked_late(folder: Path, *, step: int, **more: Any) -> None:
        if step == 2:
            waited.append(step_4.wait(LIMIT))
        write_marker(folder, step=step, **more)

    def told(self: SambayTrainer, *args: Any) -> Any:
        if self.state.global_step == 3:
            assert markers(stage) == {2: False}
            step_4.set()
        return original(self, *args)

    monkeypatch.setattr(trainer, "write_marker", marked_late)
    monkeypatch.setattr(SambayTrainer, "training_step", told)
    train_toy(tmp_path, {"max_steps": 6, "save_steps": 2, "save_total_limit": 2})
    assert waited == [True]
    assert markers(stage) == {4: True, 6: True}  # 2 went after 4 was marked, and not before


def test_a_checkpoint_that_cannot_be_marked_ends_the_run_and_the_one_before_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, *, step: int, **more: Any) -> None:
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        write_marker(folder, step=step, **more)

    settings = {"max_steps": 8, "save_steps": 2, "save_total_limit": 1}
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "write_marker", full)
        with pytest.raises(UserError, match=r"The disk is full at .* continues from the last whole checkpoint"):
            train_toy(tmp_path, settings)
    assert markers(tmp_path / "stages/one") == {2: True, 4: False}
    manifest, _ = train_toy(tmp_path, settings)
    assert manifest["steps"] == 8


def test_a_fault_is_raised_once_and_the_next_work_is_done() -> None:
    marking, done = Marking(), []
    marking.finish()
    marking.begin(lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    with pytest.raises(ZeroDivisionError):
        marking.finish()
    marking.finish()
    marking.begin(lambda: done.append(1))
    marking.begin(lambda: done.append(2))
    marking.finish()
    assert done == [1, 2]


def test_a_disk_that_never_ends_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    hung, marking = threading.Event(), Marking()
    monkeypatch.setattr("sft.train.marking.LIMIT", 0.05)
    marking.begin(lambda: hung.wait(LIMIT) and None)
    with pytest.raises(UserError, match="weren't flushed to the disk and read within"):
        marking.finish()
    hung.set()
