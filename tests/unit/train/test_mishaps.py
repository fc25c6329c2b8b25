"""What clusters do to a stage beside signals: full disks, dead trackers, processes that hang; and what stays of it."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from train_toys import read_metrics, saved_weights, signal_at, tiny_qwen, tiny_sambay, toy_rows, train_toy
from transformers import TrainerCallback

from sft.train.alerts import read_alerts
from sft.train.callbacks import EventsFile, MetricsFile
from sft.train.checkpoints import read_marker
from sft.train.gauges import Gauges, peak_rate
from sft.train.interrupt import Interrupted
from sft.train.trackers import Trackio
from sft.train.trainer import SambayTrainer
from sft.utils.errors import UserError, lost_peer

Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch: Any, *free: int) -> None:
    """A disk with so many bytes free, at one look after another; the last number stays."""
    left = list(free)
    usage = lambda path: Usage(1 << 60, 0, left.pop(0) if len(left) > 1 else left[0])  # noqa: E731
    monkeypatch.setattr("sft.train.space.shutil.disk_usage", usage)


def test_a_disk_without_room_is_told_before_the_first_step(tmp_path, monkeypatch):
    with_free(monkeypatch, 1_500_000)
    told = (
        r"There isn't room for stage one: 3 checkpoints of 1\.\d MB and its result need \d\.\d MB at .*1\.5 MB are free"
    )
    with pytest.raises(UserError, match=told):
        train_toy(tmp_path, {"max_steps": 9, "save_steps": 1})
    assert (
        not list((tmp_path / "stages/one").glob("checkpoint-*"))
        and not (tmp_path / "stages/one/metrics.jsonl").exists()
    )


def test_what_is_reckoned_is_what_is_written(tmp_path, monkeypatch):
    """To a tenth, beside the files that don't grow with a model."""
    seen: list[tuple[int, int]] = []
    from sft.train.space import BESIDE, Room

    original = Room.saved

    def saved(self, folder):
        before = self.checkpoint
        original(self, folder)
        seen.append((before - BESIDE, self.checkpoint))

    monkeypatch.setattr(Room, "saved", saved)
    wide = {"hidden_size": 192, "intermediate_size": 512}
    for number, train in enumerate(({}, {"optim": "sgd"}, {"ema": {"decay": 0.5}}, {"use_peft": True, "lora_r": 8})):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sft.train.hand_on.keep_weights_only", lambda folder: None)
            train_toy(tmp_path / str(number), {"max_steps": 1, **train}, model=tiny_qwen(**wide))
        reckoned, written = seen.pop()
        assert 0.75 * written - (1 << 18) < reckoned < 1.6 * written, (train, reckoned, written)


def test_a_disk_that_fills_up_is_told_before_a_checkpoint_is_touched(tmp_path, monkeypatch):
    train = {"max_steps": 9, "save_steps": 2}
    train_toy(tmp_path / "straight", train)
    with monkeypatch.context() as patch:
        with_free(patch, 1 << 40, 1 << 40, 1000)
        told = r"There isn't room for checkpoint-4 of stage one: it needs \d+\.\d MB at .*, and 0\.0 MB are free"
        with pytest.raises(UserError, match=told):
            train_toy(tmp_path / "full", train)
    assert read_marker(tmp_path / "full/stages/one/checkpoint-2") is not None
    (alert,) = read_alerts(tmp_path / "full/alerts.jsonl")
    assert (alert["kind"], alert["step"]) == ("disk-low", 2) and "0.0 MB are free" in alert["message"]
    assert not (tmp_path / "full/stages/one/checkpoint-4").exists()
    train_toy(tmp_path / "full", train)
    weights = [saved_weights(tmp_path / name / "stages/one/final") for name in ("straight", "full")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


class Unreachable(TrainerCallback):
    """A tracker whose server isn't there."""

    calls = 0

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route to host\nand more")

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        type(self).calls += 1


@pytest.mark.parametrize("name", ["trackio", "codecarbon"])
def test_a_tracker_out_of_reach_is_told_once(tmp_path, monkeypatch, capsys, name):
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, name, Unreachable)
    monkeypatch.setattr(Trackio, "begin", Unreachable.on_train_begin)
    monkeypatch.setattr(Trackio, "log", Unreachable.on_log)
    monkeypatch.setattr(integrations, "get_available_reporting_integrations", lambda: [name])
    manifest, _ = train_toy(tmp_path, {"max_steps": 3, "report_to": name})
    assert manifest["steps"] == 3 and Unreachable.calls == 0
    assert capsys.readouterr().err.count("can't tell of the training (no route to host): it goes on without") == 1


@pytest.mark.parametrize("begun", [True, False])
def test_a_full_log_is_told_once_and_made_good(tmp_path, monkeypatch, capsys, begun):
    """Lines 2 and 3 can't be written, the second after half of it; line 4 can."""
    original, step = MetricsFile.on_log, 0

    def on_log(self, args, state, control, logs=None, **kwargs):
        nonlocal step
        step = state.global_step
        return original(self, args, state, control, logs=logs, **kwargs)

    def fails(path: Path, *rest: Any) -> None:
        if step in (2, 3):
            if begun and step == 2:
                with open(path, "a") as handle:
                    handle.write('{"step": 2, "lo')
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

    from sft.train import callbacks

    line, write = callbacks._line, callbacks.write_metrics
    path = tmp_path / "stages/one/metrics.jsonl"
    monkeypatch.setattr(MetricsFile, "on_log", on_log)
    monkeypatch.setattr(callbacks, "_line", lambda at, logs: (fails(path) if at == step else None, line(at, logs))[1])
    monkeypatch.setattr(callbacks, "write_metrics", lambda *a: (fails(*a), write(*a))[1])
    monkeypatch.setattr(EventsFile, "_append", lambda *a: fails(path))
    seen: list[list[int]] = []
    with monkeypatch.context() as patch:
        patch.setattr("sft.train.stage.hand_over", lambda *a, **k: seen.append([x["step"] for x in read_metrics(path)]))
        with pytest.raises((TypeError, AttributeError)):
            train_toy(tmp_path, {"max_steps": 5, "save_steps": 2})["steps"]
    assert seen == [[1, 2, 3, 4, 5]]
    assert capsys.readouterr().err.count("MetricsFile can't tell of the training ([Errno 28] No space left") == 1


def test_a_stage_that_is_done_keeps_weights_only(tmp_path):
    _, layout = train_toy(tmp_path / "kept", {"max_steps": 4, "save_steps": 2, "keep_optimizer": True})
    manifest, paths = train_toy(tmp_path / "done", {"max_steps": 4, "save_steps": 2, "ema": {"decay": 0.5}})
    for step in (2, 4):
        whole, folder = (one.stage_dir("one") / f"checkpoint-{step}" for one in (layout, paths))
        assert (whole / "optimizer.pt").is_file() and (whole / "rng_state.pth").is_file()
        names = {path.name for path in folder.iterdir()}
        assert not names & {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        assert {"model.safetensors", "ema.safetensors", "trainer_state.json"} <= names
        assert read_marker(folder)["weights_only"] and read_marker(whole).get("weights_only") is None
    # Handed on once more from what is there.
    paths.stage_manifest("one").unlink()
    again, _ = train_toy(tmp_path / "done", {"max_steps": 4, "save_steps": 2, "ema": {"decay": 0.5}})
    assert again["files"] == manifest["files"]
    # But not gone on with.
    paths.stage_manifest("one").unlink()
    shutil.rmtree(paths.stage_dir("one") / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-2 holds weights alone.*--restart one"):
        train_toy(tmp_path / "done", {"max_steps": 4, "save_steps": 2, "ema": {"decay": 0.5}})


HANGING = """
import sys, time
from pathlib import Path
from train_toys import train_toy
from sft.train.trackers import Trackio
from sft.train.trainer import SambayTrainer

original = SambayTrainer.compute_loss

def where_it_hangs(self, *args, **kwargs):
    if self.state.global_step == 3:
        time.sleep(600)
    return original(self, *args, **kwargs)

SambayTrainer.compute_loss = where_it_hangs
train_toy(Path(sys.argv[1]), {"max_steps": 9, "save_steps": 2, "stall_timeout": 20})
"""


def test_a_stage_that_hangs_is_ended_with_its_stack(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2] / "support")}
    command = [sys.executable, "-c", HANGING, str(tmp_path)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert ended.returncode == 75, ended.stderr[-3000:]
    assert "sft: Stage one has not got on for" in ended.stderr and "after step 3: where rank 0 stands" in ended.stderr
    stacks = (tmp_path / "stages/one/stacks/rank-0.txt").read_text()
    assert "where_it_hangs" in stacks and "after step 3" in stacks
    (alert,) = read_alerts(tmp_path / "alerts.jsonl")
    assert (alert["kind"], alert["step"]) == ("stalled", 3)
    manifest, _ = train_toy(tmp_path, {"max_steps": 9, "save_steps": 2})
    assert manifest["steps"] == 9


def test_what_is_no_training_time_is_not_watched(tmp_path, monkeypatch):
    original = SambayTrainer.check_finite
    monkeypatch.setattr(SambayTrainer, "check_finite", lambda self: (time.sleep(3), original(self))[1])
    monkeypatch.setattr("os._exit", lambda code: pytest.fail(f"ended with {code}"))
    manifest, _ = train_toy(tmp_path, {"max_steps": 2, "save_steps": 1, "stall_timeout": 1.0e9})
    assert manifest["steps"] == 2


def test_another_number_of_rows_a_step_is_refused_where_it_can_t_be_shared(tmp_path, monkeypatch):
    from sft.train.batch import share_of

    train = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        signal_at(patch, 2)
        train_toy(tmp_path, train)
    from train_toys import toy_recipe

    folder, stage = tmp_path / "stages/one", toy_recipe(tmp_path, train).stages[0]
    assert share_of(stage, folder, {}, 1, resume=True) == (2, 3)
    assert share_of(stage, folder, {}, 3, resume=True) == (2, 1)
    assert share_of(stage, folder, {}, 2, resume=True) == (1, 3)
    assert share_of(stage, folder, {}, 2, resume=False) == (2, 3)
    with pytest.raises(UserError, match=r"begun with 6 rows an optimizer step, which 4 processes can't share evenly"):
        share_of(stage, folder, {}, 4, resume=True)
    other = toy_recipe(tmp_path, {**train, "per_device_train_batch_size": 4}).stages[0]
    assert share_of(other, folder, {}, 2, resume=True) == (4, 3)
    with pytest.raises(UserError, match=r"rows_of_a_step was 6, is now 12"):
        train_toy(tmp_path, {**train, "per_device_train_batch_size": 4})
    manifest, _ = train_toy(tmp_path, {**train, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2})
    assert manifest["steps"] == 4


def test_a_lost_peer_is_known_by_what_is_said_of_it():
    assert lost_peer(RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2"))
    assert not lost_peer(ValueError("no"))


def test_the_log_tells_how_well_a_process_is_used(tmp_path):
    _, paths = train_toy(
        tmp_path, {"max_steps": 3, "packing": True}, model=tiny_sambay(), prepared=toy_rows(9, packed=True)
    )
    for line in read_metrics(paths.metrics("one")):
        assert line["data_wait"] >= 0 and line["memory_gib"] > 0.05 and "mfu" not in line and "skew" not in line
    assert peak_rate("NVIDIA H100 80GB HBM3") == 989e12 == peak_rate("NVIDIA H200") and peak_rate("Some GPU") is None
    assert peak_rate("NVIDIA A100-SXM4-80GB") == 312e12 and peak_rate("NVIDIA L40S") == 362e12
    gauges = Gauges(torch.device("cpu"), per_token=6e9, forward_is_alone=True)
    gauges._peak = 1e12
    assert gauges.read(tokens=50.0, seconds=2.0)["mfu"] == 0.15
