"""The benchmark of the ops: it runs, it writes what it prints, and its floors are those of the roofline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmark_files import FOLDER, load

bench = load("bench_ops")
SCRIPT = str(FOLDER / "bench_ops.py")


def test_a_run_prints_and_writes_every_backend(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--device", "cpu", "--tokens", "48", "--rounds", "1"]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert {"device", "date", "torch", "python"} <= set(content["machine"])
    ops = {row["op"] for row in content["rows"]}
    assert len(ops) == 6
    for op in ops:
        rows = [row for row in content["rows"] if row["op"] == op]
        assert {"torch", "reference"} <= {row["by"] for row in rows}
        assert {row["pass"] for row in rows} == {"forward", "backward"}
        assert all(row["ms"] > 0 and row["floor ms"] is None for row in rows) and op in done.stdout


def test_an_unknown_op_is_named() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--device", "cpu", "--op", "scan"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1 and "--op scan: unknown, choose from add_layer_norm" in done.stderr


def test_floors_are_those_of_the_slowest_unit() -> None:
    a100 = bench.DEVICES["A100"]
    total = 32768 * 5120 * 16
    # 16 exponentials a clock on each of 108 multiprocessors at 1.41 GHz
    scan = bench.Work(bytes=3 * 32768 * 5120 * 2, exponentials=total, float32=4 * total)
    assert scan.floor_ms(a100) == pytest.approx(1e3 * total / (108 * 16 * 1.41e9), rel=0.15)
    copy = bench.Work(bytes=2e9)
    assert copy.floor_ms(a100) == pytest.approx(1.0)
    assert bench.Work(bytes=0, tensor=312e12).floor_ms(a100) == pytest.approx(1e3)
    assert copy.floor_ms(None) is None


def test_borders_end_at_the_tokens() -> None:
    sizes = bench.shapes_for("cpu", 100)
    assert bench.borders(sizes, "cpu").tolist() == [0, 17, 50, 100]
    assert sizes.dtype == torch.float32
