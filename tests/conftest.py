"""What every test needs: one thread, no network, and the shared data where there is any."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

# Before torch is imported anywhere: with more threads than free cores, tests take up to a hundred times longer.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What a test trains is in float32 unless it says otherwise, on any machine: this hides hardware for bfloat16.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import pytest
from children import give_children_their_signals
from clean_server import CleanServer

from sft.hub import reload

give_children_their_signals()

ROOT = Path(__file__).resolve().parents[1]


LIMITS = {"slow": 4 * 3600, "gpu": 3600}
"""Seconds a test may take, with its fixtures, by its mark; others have 1,800. A net below the limits of every wait."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Fail a test that hangs, so that the suite ends."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} has taken too long")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(max([LIMITS[mark] for mark in LIMITS if item.get_closest_marker(mark)], default=1800))
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_garbage() -> None:
    """A collection looks through all objects that there are, most of them torch's: a quarter of a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _clean_server() -> Iterator[CleanServer]:
    """Exports are checked by processes that are forked off one that has imported what they need."""
    server = CleanServer(cold=reload.run_clean)
    reload.run_clean = server.run
    yield server
    reload.run_clean = server.cold
    server.stop()


@pytest.fixture(autouse=True)
def _cold(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _clean_server: CleanServer) -> None:
    """But where a test is marked so: there they import it themselves, as they do for users."""
    if request.node.get_closest_marker("cold") is not None:
        monkeypatch.setattr(reload, "run_clean", _clean_server.cold)


def pytest_unconfigure() -> None:
    """Extensions that count what they leave behind find all of it freed."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """Real data and tokenizer beside the checkout (`../shared`, or $SAMBAY_SHARED); skips where there is none."""
    folder = Path(os.environ.get("SAMBAY_SHARED") or ROOT.parent / "shared")
    if not folder.is_dir():
        pytest.skip(f"no shared data: {folder} is missing (set SAMBAY_SHARED to a folder with data/ and models/)")
    return folder.resolve()


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder as the current one."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
