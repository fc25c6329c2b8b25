"""Two processes train as one: DDP on gloo, with rows that don't divide evenly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_toys import read_metrics, saved_weights, tiny_sambay, toy_rows, train_toy
from train_worker import ROWS

TRAIN = {"packing": True, "num_train_epochs": 2, "optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    worker = Path(__file__).parents[1] / "support/train_worker.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(worker)]
    return subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_processes_train_as_one(tmp_path):
    """14 rows in steps of 4, so that some micro-batches are empty. A signal to one process stops both, in the second of
    two epochs; the same command goes on."""
    train = {**TRAIN, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    arguments = (str(tmp_path / "two"), json.dumps(train), "sambay")
    stopped = torchrun(*arguments, "6")
    assert stopped.returncode != 0 and "Stopped at step 6 of 8 of stage one" in stopped.stderr, stopped.stderr[-3000:]
    resumed = torchrun(*arguments)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    two = json.loads((tmp_path / "two/stages/one/manifest.json").read_text())
    assert (two["world_size"], two["engine"]) == (2, "DistributedDataParallel")

    train = {**TRAIN, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    one, paths = train_toy(tmp_path / "one", train, model=tiny_sambay(), prepared=toy_rows(ROWS, packed=True))
    assert one["world_size"] == 1
    lines = [read_metrics(path) for path in (tmp_path / "two/stages/one/metrics.jsonl", paths.metrics("one"))]
    assert len(lines[0]) == len(lines[1]) == 8
    for a, b in zip(*lines, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], abs=1e-5)
        assert (a["tokens"], a["supervised_tokens"]) == (b["tokens"], b["supervised_tokens"])
    weights = saved_weights(tmp_path / "two/stages/one/final")
    for name, weight in saved_weights(paths.final_dir("one")).items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-6)
