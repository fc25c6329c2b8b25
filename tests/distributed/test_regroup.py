"""A stage that is killed goes on with another number of processes, or on another engine, as if it had not been."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import SUPPORT, run_alone
from train_toys import saved_weights


def victim(folder: Path, *arguments: str, limit: float) -> dict[str, Any]:
    end = run_alone([str(SUPPORT / "regroup_victim.py"), str(folder), *arguments], limit=limit)
    assert end.code == 0, end.stderr[-5000:]
    return json.loads((folder / "results.json").read_text())


def check(found: dict[str, Any], expected: dict[str, Any], folder: Path, straight: Path, rel: float) -> None:
    """Each step took in the same rows, left out or not; losses and weights are the same, as far as rounding goes."""
    assert found["consumed"] == expected["consumed"] and len(found["consumed"]) == 12
    documents = sorted(document for rows in found["consumed"].values() for document in rows)
    assert documents == sorted(document for rows in expected["consumed"].values() for document in rows)
    assert found["left_out"] == expected["left_out"] and found["skipped"] == expected["skipped"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=rel) and len(found["losses"]) == 9
    weights = saved_weights(folder / "run/stages/one/final")
    for name, weight in saved_weights(straight / "run/stages/one/final").items():
        torch.testing.assert_close(weights[name], weight, rtol=rel, atol=1e-6 * bool(rel))


def engines(folder: Path, *chains: str, limit: float) -> None:
    results = victim(folder, "engines", ",".join(chains), limit=limit)
    for name in chains:
        check(results[name], results["straight"], folder / name, folder / "straight", 1e-5)


def kills(folder: Path, number: int, seed: str, limit: float) -> None:
    results = victim(folder, "kills", str(number), seed, limit=limit)
    assert len(results["places"]) >= number
    assert len(results["straight"]["left_out"]["steps"]) == 3 and len(results["straight"]["left_out"]["returns"]) == 1
    for run in results["runs"]:
        check(run, results["straight"], Path(run["folder"]), folder / "straight", 1e-5)


def test_from_engine_to_engine(tmp_path: Path) -> None:
    engines(tmp_path, "1none+2zero3+2none", limit=800)  # the second returns to a checkpoint of the first


def test_four_kills_on_one_and_two_processes(tmp_path: Path) -> None:
    kills(tmp_path, 4, os.environ.get("KILL_SEED", "1"), 800)


@pytest.mark.slow
def test_a_hundred_kills_on_one_and_two_processes(tmp_path: Path) -> None:
    kills(tmp_path, 100, os.environ.get("KILL_SEED", "2"), 3 * 3600)


@pytest.mark.slow
def test_from_every_engine_to_every_other(tmp_path: Path) -> None:
    words = [f"{size}{engine}" for size in (1, 2) for engine in ("none", "zero1", "zero2", "zero3")]
    engines(tmp_path, *(f"{one}+{other}+{one}" for one in words for other in words if one < other), limit=2 * 3600)
