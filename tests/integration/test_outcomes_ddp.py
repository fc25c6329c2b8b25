"""Two processes keep the moving average, count and stop as one does, also after a signal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from train_toys import read_metrics, saved_weights, tiny_sambay, toy_rows, train_toy
from train_worker import HELD_OUT, ROWS

PACKED = {"packing": True, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 3}
SGD = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 6}
AVERAGED = {**PACKED, **SGD, "ema": {"decay": 0.6, "start": 1}}


def two(root: Path, train: dict[str, Any], *stop: str) -> list[int]:
    ends = run_ranks("train_worker.py", str(root), json.dumps(train), "sambay", *stop, limit=300)
    assert stop or [end.code for end in ends] == [0, 0], "\n".join(end.stderr[-2000:] for end in ends)
    return [end.code for end in ends]


def result(root: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, torch.Tensor]]:
    folder = root / "stages/one"
    manifest = json.loads((folder / "manifest.json").read_text())
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]
    return manifest, lines, saved_weights(folder / "final")


@pytest.mark.parametrize("engine", [pytest.param(None, marks=pytest.mark.slow), "zero2"])
def test_the_moving_average_of_two_processes_is_that_of_one(tmp_path: Path, engine: str | None) -> None:
    train = {**AVERAGED, **({"deepspeed": engine} if engine else {})}
    two(tmp_path / "straight", train)
    assert two(tmp_path / "resumed", train, "4") == [143, 143]
    two(tmp_path / "resumed", train)
    manifest, lines, weights = result(tmp_path / "straight")
    same, again, resumed = result(tmp_path / "resumed")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
    rows = toy_rows(ROWS, packed=True, held_out=HELD_OUT)
    train_toy(tmp_path / "one", {**AVERAGED, "per_device_train_batch_size": 2}, model=tiny_sambay(), prepared=rows)
    one, whole, expected = result(tmp_path / "one")
    losses = [told["validation"]["loss_at_end"] for told in (manifest, same, one)]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-5)
    assert one["validation"]["loss_of_last_step"] != pytest.approx(losses[2], rel=1e-4)
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=2e-6)
    for found, other, wanted in zip(lines, again, whole, strict=True):
        for key in ("mean_token_accuracy", "entropy"):
            assert found[key] == other[key] == pytest.approx(wanted[key], abs=1e-5)


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path: Path) -> None:
    train = {**PACKED, "max_steps": 150, "logging_steps": 4, "stage": {"stop_when": {"token_accuracy": 0.6}}}
    two(tmp_path / "straight", train)
    manifest, lines, weights = result(tmp_path / "straight")
    end = manifest["stopped"]["step"]
    assert end == lines[-1]["step"] < 150 and lines[-1]["mean_token_accuracy"] >= 0.6
    assert all(line["mean_token_accuracy"] < 0.6 for line in lines[:-1])
    assert two(tmp_path / "resumed", train, str(end - 1)) == [143, 143]
    two(tmp_path / "resumed", train)
    again, _, resumed = result(tmp_path / "resumed")
    assert again["stopped"] == manifest["stopped"]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in weights.items())
