"""Two processes train as one: DDP on gloo, with rows that don't divide evenly."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest
import torch
from children import wait_until
from ranks import SUPPORT, run_ranks
from train_toys import read_metrics, saved_weights, tiny_sambay, toy_rows, train_toy
from train_worker import HELD_OUT, ROWS

TRAIN = {"packing": True, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCH, str(SUPPORT / "train_worker.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one(tmp_path):
    """14 rows in steps of 4, so that some micro-batches are empty. A signal to one process stops both, in the second of
    two epochs; the same command goes on."""
    held = {"eval_strategy": "steps", "eval_steps": 3, "per_device_eval_batch_size": 1}
    train = {**TRAIN, **held, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    arguments = (str(tmp_path / "two"), json.dumps(train), "sambay")
    stopped = run_ranks("train_worker.py", *arguments, "6", limit=300)
    assert [end.code for end in stopped] == [143, 143], stopped[0].stderr[-3000:]
    assert "Stopped at step 6 of 8 of stage one" in stopped[0].stderr
    resumed = torchrun(*arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    two = json.loads((tmp_path / "two/stages/one/manifest.json").read_text())
    assert (two["world_size"], two["engine"]) == (2, "DistributedDataParallel")

    train = {**TRAIN, **held, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    rows = toy_rows(ROWS, packed=True, held_out=HELD_OUT)
    one, paths = train_toy(tmp_path / "one", train, model=tiny_sambay(), prepared=rows)
    assert one["world_size"] == 1
    whole = [read_metrics(path) for path in (tmp_path / "two/stages/one/metrics.jsonl", paths.metrics("one"))]
    for a, b in zip(*([line for line in lines if "eval_loss" in line] for lines in whole), strict=True):
        assert a["step"] == b["step"] and a["eval_supervised_tokens"] == b["eval_supervised_tokens"] > 0
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], abs=1e-6)
    assert [line["step"] for line in whole[0] if "eval_loss" in line] == [0, 3, 6, 8]
    lines = [[line for line in lines if "loss" in line] for lines in whole]
    assert len(lines[0]) == len(lines[1]) == 8
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)
        assert (a["tokens"], a["supervised_tokens"]) == (b["tokens"], b["supervised_tokens"])
    weights = saved_weights(tmp_path / "two/stages/one/final")
    for name, weight in saved_weights(paths.final_dir("one")).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-6)


def test_processes_decide_together(tmp_path):
    """What one process sees all act on: a loss that isn't finite, a signal in the last step; and no process runs the
    model on micro-batches that no process has a token in."""
    ends = run_ranks("rank_worker.py", str(tmp_path), limit=300)
    assert [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-3000:] for end in ends)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert "The loss is not a finite number at step 3: training diverged." in first["bad loss"]["told"]
    assert first["bad loss"]["told"].count("/checkpoint-2. ") == 1
    assert [path.name for path in (tmp_path / "bad loss/stages/one").glob("checkpoint-*")] == ["checkpoint-2"]
    assert first["huge"]["told"].startswith("24 of 24 trainable tensors are not finite")
    assert not (tmp_path / "huge/stages/one/final").exists()
    assert (first["signal"]["code"], first["signal"]["told"][:39]) == (138, "Stopped after stage one, which is done.")
    assert (tmp_path / "signal/stages/one/manifest.json").is_file()
    # 14 rows an epoch for two processes, which don't always get as many; with the rows that fill it up, 40.
    assert first["filled"]["told"] == 2 and 14 <= first["filled"]["passes"] < 24
    # Gradients are sent once a step, in however many micro-batches.
    assert first["exchanges"]["5"] == first["exchanges"]["1"] > 0
    assert first["exchanges"]["apart"] == 0
    assert (first["sums"], first["largest"]) == ([[3, 10], [3, 10]], [2])
    rows = toy_rows(14, packed=False)
    _, layout = train_toy(tmp_path / "one", {"per_device_train_batch_size": 20, "num_train_epochs": 2}, prepared=rows)
    weights = saved_weights(tmp_path / "filled/stages/one/final")
    for name, weight in saved_weights(layout.final_dir("one")).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=5e-6)


def test_a_launcher_that_dies_leaves_no_process_behind(tmp_path):
    """torchrun ends on a SIGUSR1 that it isn't told to hand on; its processes save and go."""
    train = {**TRAIN, "per_device_train_batch_size": 1, "max_steps": 2000}
    command = [*LAUNCH, str(SUPPORT / "train_worker.py"), str(tmp_path), json.dumps(train), "sambay"]
    errors = tmp_path / "errors"
    with open(errors, "w") as stream:
        launcher = subprocess.Popen(command, stderr=stream, env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        metrics = tmp_path / "stages/one/metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, 200, launcher)
        launcher.send_signal(signal.SIGUSR1)
        assert launcher.wait(60) == -signal.SIGUSR1
        wait_until(lambda: errors.read_text().count("everything saved. The same command continues") == 2, 100)
    finally:
        launcher.kill()
    assert len(list((tmp_path / "stages/one").glob("checkpoint-*/complete.json"))) == 1


RESTARTED = """
import os, signal, sys
from pathlib import Path
from train_toys import tiny_sambay, toy_rows, train_toy
from sft.train.callbacks import StopOnSignal
from sft.utils.errors import UserError

signum, attempt = int(sys.argv[2]), os.environ["TORCHELASTIC_RESTART_COUNT"]
Path(sys.argv[1], f"attempt-{attempt}-{os.environ['RANK']}").touch()
original = StopOnSignal.on_step_end

def on_step_end(self, args, state, control, **kwargs):
    if state.global_step == 5 and attempt == "0" and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signum)
    return original(self, args, state, control, **kwargs)

StopOnSignal.on_step_end = on_step_end
train = {"packing": True, "max_steps": 8, "save_steps": 2, "per_device_train_batch_size": 1}
try:
    train_toy(Path(sys.argv[1]), train, model=tiny_sambay(), prepared=toy_rows(14, packed=True))
except UserError as error:
    print(error, file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGUSR1, marks=pytest.mark.slow)])
def test_a_launcher_starts_a_lost_process_again_and_none_that_was_told_to_stop(tmp_path, signum):
    """One of two is killed: all begin again, from the last whole checkpoint. One is told to stop: all save and go."""
    (tmp_path / "worker.py").write_text(RESTARTED)
    command = [*LAUNCH, "--max_restarts", "2", str(tmp_path / "worker.py"), str(tmp_path), str(int(signum))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)
    attempts = sorted(path.name for path in tmp_path.glob("attempt-*"))
    stage = tmp_path / "stages/one"
    if signum == signal.SIGKILL:
        assert done.returncode == 0 and len(attempts) == 4, done.stderr[-3000:]
        assert json.loads((stage / "manifest.json").read_text())["steps"] == 8
        events = [json.loads(line) for line in (stage / "events.jsonl").read_text().splitlines()]
        assert [event["step"] for event in events if event["event"] == "restart"] == [4]
    else:
        assert done.returncode != 0 and len(attempts) == 2, done.stderr[-3000:]
        assert "Stopped at step 5 of 8 of stage one, everything saved" in done.stderr
        assert (stage / "checkpoint-5/complete.json").is_file() and not (stage / "manifest.json").exists()


@pytest.mark.parametrize(
    "words",
    [["--seeed", "1"], *(pytest.param(w, marks=pytest.mark.slow) for w in (["--stage", "none"], ["--restart"]))],
)
def test_a_mistake_is_told_once(tmp_path, words):
    done = subprocess.run(
        [*LAUNCH, "-m", "sft", "run", "tiny", "--output_dir", str(tmp_path), *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode != 0 and done.stderr.count("sft: ") == 1, done.stderr


def test_a_rehearsal_is_told_once(tmp_path):
    done = subprocess.run(
        [*LAUNCH, "-m", "sft", "run", "tiny", "--output_dir", str(tmp_path), "--dry_run"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stdout == f"{tmp_path}/resolved.yaml\n", done.stderr
    assert done.stderr.count("tiny: 3 stages") == 1 and "x 2 processes" in done.stderr
