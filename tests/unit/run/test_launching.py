"""Several processes as one command: its status, what it says, signals, and that none is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import SUPPORT, free_port

LIMIT = 60.0


def start(tmp_path: Path, case: str, **environ: str) -> subprocess.Popen[str]:
    words = [sys.executable, str(SUPPORT / "launch_worker.py"), "launch", "2", case, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(words, text=True, env={**os.environ, **environ}, **pipes)  # type: ignore[call-overload]


def until(condition) -> bool:
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def pids(tmp_path: Path) -> list[int]:
    files = [tmp_path / f"pid-{rank}" for rank in (0, 1)]
    assert until(lambda: all(file.is_file() and file.read_text() for file in files))
    return [int(file.read_text()) for file in files]


@pytest.mark.parametrize(
    ("case", "status", "err"),
    [
        ("fine", 0, "library's words of 0\n"),
        ("fails2", 2, "library's words of 0\nsft: rank 1: no such thing\n"),
        ("killed", 1, "sft: rank 1 was ended by SIGKILL (the system does so where memory runs out)\n"),
    ],
)
def test_the_status_and_what_is_told(tmp_path, case, status, err):
    """The first process has the terminal; of another one, what it said when it failed, once."""
    out, told = (process := start(tmp_path, case)).communicate(timeout=LIMIT)
    assert process.returncode == status, told
    # In any order: the launcher sees an end when it looks.
    assert out == "out of 0 of 2\n" and set(err.splitlines()) <= set(told.splitlines())
    assert told.count("no such thing") == err.count("no such thing")
    assert ("library's words of 1" in told) == (case == "killed")  # it said nothing else


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_handed_on_and_waited_for(tmp_path, name):
    """Also where one process saves on when the other has gone long since."""
    process, signum = start(tmp_path, "saves"), signal.Signals[name]
    pids(tmp_path)
    process.send_signal(signum)
    _, told = process.communicate(timeout=LIMIT)
    assert process.returncode == 128 + signum and "sft:" not in told
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_a_terminal_that_goes_away_is_a_reason_to_save(tmp_path):
    process = start(tmp_path, "waits")
    pids(tmp_path)
    process.send_signal(signal.SIGHUP)
    process.communicate(timeout=LIMIT)
    assert process.returncode == 143 and (tmp_path / "saved-0").exists()


def test_a_launcher_that_is_killed_leaves_nobody(tmp_path):
    process = start(tmp_path, "waits")
    ranks = pids(tmp_path)
    process.kill()
    process.communicate(timeout=LIMIT)
    assert until(lambda: not any(psutil.pid_exists(pid) for pid in ranks))
    assert (tmp_path / "saved-0").exists() and (tmp_path / "saved-1").exists()


def test_two_nodes_end_together(tmp_path):
    """Four processes of two nodes; one of the second's fails, and the first one's end, too."""
    common = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    nodes = [start(tmp_path, "killed" if node else "waits", NODE_RANK=str(node), **common) for node in (1, 0)]
    ends = [(*node.communicate(timeout=LIMIT), node.returncode) for node in nodes]
    assert [code for _, _, code in ends] != [0, 0]
    assert "another node's processes have failed" in ends[1][1], ends
    assert ends[1][0] == "out of 0 of 4\n" and ends[0][0] == "out of 2 of 4\n"
