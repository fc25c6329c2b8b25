"""SIGKILL at any moment of training, then the same command again: the same weights as without it."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from train_toys import read_metrics, saved_weights, tiny_sambay, toy_rows, train_toy
from train_worker import ROWS

TRAIN = {"packing": True, "per_device_train_batch_size": 2, "max_steps": 40, "save_steps": 1, "save_total_limit": 2}
COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "tokens", "supervised_tokens")


def start(root: Path) -> subprocess.Popen[str]:
    worker = Path(__file__).parents[1] / "support/train_worker.py"
    command = [sys.executable, str(worker), str(root), json.dumps(TRAIN), "sambay"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_steps(process: subprocess.Popen[str], metrics: Path, steps: int) -> None:
    """Until `metrics` has `steps` lines; fails when the process ends before."""
    limit = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate(timeout=60)[1]
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_killed_runs_end_as_undisturbed_ones(tmp_path):
    """A checkpoint is written at every step, so most moments are in the middle of one. Then Ctrl-C, then the end."""
    rng = random.Random(os.environ.get("KILL_SEED", "1"))
    root = tmp_path / "killed"
    metrics = root / "stages/one/metrics.jsonl"
    for steps in (4, 14):
        process = start(root)
        wait_for_steps(process, metrics, steps)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate(timeout=60)
        assert not (root / "stages/one/manifest.json").exists()
    process = start(root)
    wait_for_steps(process, metrics, 24)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "The same command continues." in errors and "Traceback" not in errors
    process = start(root)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors

    _, paths = train_toy(tmp_path / "straight", TRAIN, model=tiny_sambay(), prepared=toy_rows(ROWS, packed=True))
    lines = [
        [{key: line[key] for key in COMPARED} for line in read_metrics(path)]
        for path in (metrics, paths.metrics("one"))
    ]
    assert lines[0] == lines[1]
    killed, straight = saved_weights(root / "stages/one/final"), saved_weights(paths.final_dir("one"))
    assert killed.keys() == straight.keys()
    assert all(torch.equal(killed[name], straight[name]) for name in straight)
