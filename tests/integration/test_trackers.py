"""What trackers see of a run: stages as a group of runs with one axis of steps, though the second is stopped once.

Nothing leaves the machine: trackio and MLflow write to folders, Weights & Biases is offline. The last two are here for
`make test-trackers` alone.
"""

from __future__ import annotations

import importlib.util
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_toys import small_recipe
from train_toys import read_metrics

from sft.recipe import resolved_yaml

PROJECT = "sums"
HERE = [name for name in ("trackio", "wandb", "mlflow") if importlib.util.find_spec(name)]
SCRIPT = Path(__file__).parents[1] / "support" / "tracked_run.py"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a run, with what the trackers wrote beside it."""
    root = tmp_path_factory.mktemp("tracked")
    told = {"report_to": HERE, "project": PROJECT}
    (root / "r.yaml").write_text(resolved_yaml(small_recipe(root, stages=(told, told))))
    where = {"TRACKIO_DIR": str(root / "trackio"), "MLFLOW_TRACKING_URI": f"sqlite:///{root / 'mlflow.db'}"}
    here = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "MLFLOW_", "TRACKIO_"))}
    here |= {**where, "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), str(root / "r.yaml")]
    done = subprocess.run(command, env=here, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "can't tell of the training" not in done.stderr and "can't be told" not in done.stderr
    stopped, went_on = done.stdout.strip().split("\n\n")
    assert "error" in json.loads(stopped) and json.loads(went_on)["stages"]
    return root


def group_of(run: Path) -> str:
    """What trackers call the run."""
    group = json.loads((run / "run/trackers.json").read_text())["group"]
    assert group.startswith("small-")
    return group


def losses(run: Path, stage: str, before: int) -> dict[str, dict[int, float]]:
    """Of a stage: name -> step of the whole run -> loss, of metrics.jsonl; and pass@1 after the stage, of the suite."""
    lines = read_metrics(run / "run/stages" / stage / "metrics.jsonl")
    losses = {before + line["step"]: line["loss"] for line in lines if "loss" in line}
    metrics = json.loads((run / "run/eval" / stage / "sums/metrics.json").read_text())
    return {"train/loss": losses, "eval/sums/pass_at_1": {before + 3: metrics["pass_at_1"]}}


def expected(run: Path) -> dict[str, dict[str, dict[int, float]]]:
    """Of each stage's run, by its name."""
    group = group_of(run)
    return {f"{group}-a": losses(run, "a", 0), f"{group}-b": losses(run, "b", 3)}


def add(found: dict[str, dict[str, dict[int, float]]], run: str, step: int, numbers: dict[str, float]) -> None:
    """Note of a step's numbers those that are `expected`."""
    for name in ("train/loss", "eval/sums/pass_at_1"):
        if name in numbers:
            found.setdefault(run, {}).setdefault(name, {})[step] = numbers[name]


def check_config(config: dict[str, Any]) -> None:
    """Settings and funnel, as values or as text."""
    assert float(config["train.learning_rate"]) == 2e-3 and int(config["prepared.funnel.kept"]) == 16
    assert str(config["runs.world_size"]) == "1" and "rows.jsonl" in str(config["data.sources"])


def test_trackio(run: Path) -> None:
    """In a process of its own: trackio reads where it writes to when it is imported."""
    code = (
        "import json, sys; from trackio.sqlite_storage import SQLiteStorage as S; p = sys.argv[1];"
        "print(json.dumps([[r['name'], S.get_run_config(p, r['name']), S.get_logs(p, r['name'])] "
        "for r in S.get_run_records(p)]))"
    )
    here = {**os.environ, "TRACKIO_DIR": str(run / "trackio")}
    command = [sys.executable, "-c", code, PROJECT]
    done = subprocess.run(command, env=here, capture_output=True, text=True, timeout=120, check=True)
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, config, lines in json.loads(done.stdout):
        for line in lines:
            add(found, name, line["step"], line)
        assert config["_Group"] == group_of(run)
        check_config(config)
    assert found == expected(run)


@pytest.mark.skipif("mlflow" not in HERE, reason="mlflow isn't installed: make test-trackers")
def test_mlflow(run: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(PROJECT)
    assert experiment is not None
    runs = {one.info.run_name: one for one in client.search_runs([experiment.experiment_id])}
    parent = runs.pop(group_of(run))
    found: dict[str, dict[str, dict[int, float]]] = {}
    for name, one in runs.items():
        for metric in one.data.metrics:
            for point in client.get_metric_history(one.info.run_id, metric):
                add(found, name, point.step, {metric: point.value})
    assert found == expected(run)
    for one in runs.values():
        assert one.data.tags["mlflow.parentRunId"] == parent.info.run_id and one.info.status == "FINISHED"
        check_config(one.data.params)


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B would send: records in LevelDB's log format (pieces in blocks of 32 KiB) behind a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, gathered = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        gathered += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last piece
            yield Record.FromString(gathered)
            gathered = b""


def named_values(items: Any) -> dict[str, Any]:
    """A record's items."""
    return {"/".join([item.key, *item.nested_key]).strip("/"): json.loads(item.value_json) for item in items}


@pytest.mark.skipif("wandb" not in HERE, reason="wandb isn't installed: make test-trackers")
def test_wandb(run: Path) -> None:
    """A stage has a file for each time that something was told of it, all of one run."""
    found: dict[str, dict[str, dict[int, float]]] = {}
    configs: dict[str, dict[str, Any]] = {}
    files = sorted((run / "run/wandb").glob("offline-run-*/*.wandb"))
    names = {}
    for file in files:
        for record in wandb_records(file):
            if record.HasField("run"):
                assert (record.run.run_group, record.run.project) == (group_of(run), PROJECT)
                names[record.run.run_id] = record.run.display_name
            configs.setdefault(file.stem, {}).update(named_values(record.config.update))
            line = named_values(record.history.item)
            if line:
                add(found, names[file.stem.removeprefix("run-")], line["train/global_step"], line)
    assert found == expected(run)
    assert len(files) == 5 and len(names) == 2  # two starts of the second stage, and the results of each
    for config in configs.values():
        check_config(config)
