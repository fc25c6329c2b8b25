"""`sft run` on three stages, killed and told to stop at any moment: the same command again makes what one run makes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


def victim(repo_root: Path, folder: Path, *arguments: str, limit: float) -> str:
    """What chain_victim.py says in the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repo_root)}
    command = [sys.executable, str(repo_root / "tests/support/chain_victim.py"), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def test_a_random_kill(repo_root: Path, tmp_path: Path) -> None:
    seed = os.environ.get("KILL_SEED", "1")
    assert "1 runs ended early" in victim(repo_root, tmp_path, "1", seed, limit=800)


@pytest.mark.slow
def test_a_hundred_random_kills(repo_root: Path, tmp_path: Path) -> None:
    seed = os.environ.get("KILL_SEED", "2")
    assert "100 runs ended early" in victim(repo_root, tmp_path, "100", seed, limit=3 * 3600)


@pytest.mark.slow
def test_a_signal_in_every_phase(repo_root: Path, tmp_path: Path) -> None:
    said = victim(repo_root, tmp_path, "phases", limit=3600)
    for phase in ("start", "preparation", "steps", "checkpoint", "hand-over", "evaluation", "export", "report"):
        assert phase in said


@pytest.mark.slow
def test_one_of_two_processes_killed(repo_root: Path, tmp_path: Path) -> None:
    assert "killed" in victim(repo_root, tmp_path, "ranks", os.environ.get("KILL_SEED", "3"), limit=3600)
