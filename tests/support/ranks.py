"""Start a script on several ranks, with a hard limit on its time: nothing that was started outlives the call."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from warm import WarmPopen

SUPPORT = Path(__file__).parent
Process = subprocess.Popen[bytes] | WarmPopen

AFTER_FAILURE = 30.0
"""Seconds that other ranks get when one has failed."""


@dataclass(frozen=True)
class Ended:
    """How a process ended. A negative `code` is the signal that killed it."""

    code: int
    stdout: str
    stderr: str


def run_ranks(
    script: str,
    *arguments: str,
    ranks: int = 2,
    limit: float = 120,
    env: Mapping[str, str] | None = None,
    after_failure: float = AFTER_FAILURE,
) -> list[Ended]:
    """Run `tests/support/<script>` as `ranks` processes, as torchrun would, in less time; their ends, by rank.

    The call fails when the limit runs out, or one fails and another goes on for `after_failure`.
    """
    port = free_port()
    settings = [
        {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        for rank in range(ranks)
    ]
    words = [str(SUPPORT / script), *arguments]
    return _run([words] * ranks, settings, limit, env or {}, after_failure)


def run_torchrun(
    words: Sequence[str], *, ranks: int = 2, limit: float = 120, env: Mapping[str, str] | None = None
) -> Ended:
    """Run `python WORDS` under torchrun itself."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    return _run([command], [{}], limit, env or {})[0]


def run_alone(words: Sequence[str], *, limit: float = 120, env: Mapping[str, str] | None = None) -> Ended:
    """Run `python WORDS` as one process."""
    return _run([words], [{}], limit, env or {})[0]


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _run(
    commands: Sequence[Sequence[str]],
    settings: Sequence[Mapping[str, str]],
    limit: float,
    env: Mapping[str, str],
    after_failure: float = AFTER_FAILURE,
) -> list[Ended]:
    common = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT), **env}
    with ExitStack() as stack:
        outputs = [[stack.enter_context(tempfile.NamedTemporaryFile("w+")) for _ in range(2)] for _ in commands]
        processes = [
            _started(command, {**common, **own}, *pair, cold=bool(env))
            for command, own, pair in zip(commands, settings, outputs, strict=True)
        ]
        try:
            in_time = _wait(processes, limit, after_failure)
        finally:
            for process in processes:
                _kill(process)
        ends = [
            Ended(process.returncode, *(_text(handle) for handle in pair))
            for process, pair in zip(processes, outputs, strict=True)
        ]
    assert in_time, f"not done in {limit} s: " + "\n".join(end.stderr[-2000:] for end in ends)
    return ends


def _started(words: Sequence[str], env: Mapping[str, str], out: Any, err: Any, *, cold: bool) -> Process:
    """`python WORDS`; a script in `env`, which may be read when libraries are imported, and a module import anew."""
    if cold or not words[0].endswith(".py"):
        command = [sys.executable, *words]
        return subprocess.Popen(command, env=env, stdout=out, stderr=err, stdin=subprocess.DEVNULL)
    return WarmPopen(words, env, Path(out.name), Path(err.name))


def _wait(processes: Sequence[Process], limit: float, after_failure: float) -> bool:
    deadline = time.monotonic() + limit
    failed = False
    while any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + after_failure)
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _kill(process: Process) -> None:
    """Kill a process with all that it started: torchrun gives each of its ranks a session of its own."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    for child in family:
        child.kill()
    process.kill()
    process.wait(timeout=20)


def _text(handle: object) -> str:
    handle.seek(0)  # type: ignore[attr-defined]
    return str(handle.read())  # type: ignore[attr-defined]
