"""The Makefile's targets where there is no GPU, and the entry of continuous integration."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest


def make(root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`make`, with the environment taken as built: a test must not install anything."""
    return subprocess.run(
        ["make", "-o", ".venv/.installed", *words], cwd=root, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("target", ["gpu-check", "test-gpu", "bench-gpu"])
def test_gpu_targets_fail_clearly_without_a_gpu(repo_root: Path, target: str) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    if not (repo_root / ".venv/bin/python").exists():
        pytest.skip("the checkout has no .venv: the tests run from another environment")
    done = make(repo_root, target)
    assert done.returncode != 0 and "no CUDA device: this target needs one" in done.stderr


@pytest.mark.parametrize("target", ["setup", "demo", "test", "lint", "bench", "test-gpu", "bench-gpu", "gpu-check"])
def test_every_target_builds_the_environment_when_it_is_missing(repo_root: Path, tmp_path: Path, target: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((repo_root / name).read_text())
    planned = subprocess.run(["make", "-n", target], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert planned.returncode == 0, planned.stderr
    assert '-m pip install --quiet -c constraints.txt -e ".[dev]"' in planned.stdout
    assert planned.stdout.index("-m venv .venv") < planned.stdout.index("-m pip install")


def test_ci_runs_the_tests(repo_root: Path) -> None:
    script = repo_root / ".ci/run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
