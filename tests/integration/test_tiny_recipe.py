"""The tiny recipe through all its stages, cut down to about two minutes: what `make demo` does at full size."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALLER = {
    "stages.midtrain.data.sources.0.generate.rows": 600,
    "stages.midtrain.data.sources.1.generate.rows": 30,
    "stages.midtrain.data.sources.2.generate.rows": 10,
    "stages.hard.data.sources.0.generate.rows": 90,
    "stages.hard.data.sources.1.generate.rows": 30,
    "stages.hard.data.sources.2.generate.rows": 4,
    "stages.hard.data.sources.3.generate.rows": 2,
    "stages.long.data.sources.0.generate.rows": 3,
    "stages.long.data.sources.1.generate.rows": 2,
    "stages.long.data.sources.2.generate.rows": 6,
    "stages.long.data.sources.3.generate.rows": 60,
    "stages.all.train.logging_steps": 5,
    "stages.all.evaluate.suites.0.source.generate.rows": 12,
    "stages.all.evaluate.suites.0.max_new_tokens": 120,
    "stages.long.evaluate.suites.1.source.generate.rows": 2,
    "stages.long.evaluate.suites.1.max_new_tokens": 200,
    "stages.long.evaluate.suites.2.source.generate.rows": 2,
    "stages.long.evaluate.suites.2.max_new_tokens": 200,
}
STAGES = ("midtrain", "hard", "long")


def sft_run(repo_root: Path, output_dir: Path) -> subprocess.CompletedProcess[str]:
    overrides = [word for key, value in SMALLER.items() for word in (f"--{key}", str(value))]
    command = [sys.executable, "-m", "sft", "run", "--config", str(repo_root / "configs/tiny/recipe.yaml")]
    return subprocess.run(
        [*command, "--output_dir", str(output_dir), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def run(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("tiny") / "run"
    done = sft_run(repo_root, output_dir)
    assert done.returncode == 0, done.stderr[-3000:]
    return output_dir


def losses(run: Path, stage: str) -> list[float]:
    lines = (run / "stages" / stage / "metrics.jsonl").read_text().splitlines()
    return [entry["loss"] for entry in map(json.loads, lines) if "loss" in entry]


def test_the_loss_falls_within_the_first_stage_and_from_stage_to_stage(run: Path) -> None:
    first = losses(run, "midtrain")
    assert first[0] > 3.0
    assert sum(first[-3:]) / 3 < 1.6
    assert losses(run, "hard")[0] < first[0] / 1.5  # it started from what the first stage made


def test_every_row_is_accounted_for(run: Path) -> None:
    for stage, rows in zip(STAGES, (640, 126, 71), strict=True):
        data = json.loads((run / "stages" / stage / "manifest.json").read_text())["data"]
        assert data["funnel"]["rows"] == rows == data["funnel"]["kept"] + sum(data["funnel"]["dropped"].values())
    assert data["max_document_length"] > 1000


def test_every_point_is_evaluated_and_reported(run: Path) -> None:
    for point in ("start", *STAGES):
        metrics = json.loads((run / "eval" / point / "short" / "metrics.json").read_text())
        assert metrics["problems"] == 12
        assert len((run / "eval" / point / "short" / "samples.jsonl").read_text().splitlines()) == 12
    report = (run / "report" / "index.html").read_text()
    assert all(stage in report for stage in STAGES) and "<svg" in report


def test_the_export_is_there_with_its_code_and_card(run: Path) -> None:
    names = {path.name for path in (run / "export").iterdir()}
    assert {"model.safetensors", "config.json", "modeling_phi4flash.py", "ops_phi4flash.py", "README.md"} <= names
    manifest = json.loads((run / "manifest.json").read_text())
    assert set(manifest["stages"]) == set(STAGES)


def test_the_same_command_again_changes_nothing(repo_root: Path, run: Path) -> None:
    weights = run / "stages" / "long" / "final" / "model.safetensors"
    before = weights.stat().st_mtime_ns
    again = sft_run(repo_root, run)
    assert again.returncode == 0, again.stderr[-3000:]
    assert "done already" in again.stderr
    assert weights.stat().st_mtime_ns == before
