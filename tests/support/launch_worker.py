"""A launcher and its processes without anything heavy: `launch_worker.py launch N CASE FOLDER` starts N of itself."""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch


def launch(count: int, case: str, folder: str) -> int:
    from sft.run import launching
    from sft.run.placement import placement

    launching.ALONE, launching.ENDING = 1.0, 5.0
    where = placement(count)
    assert where is not None
    with patch.object(launching, "_python", lambda: [sys.executable, __file__]), ExitStack() as stack:
        if where.nodes == 1:  # the store that these processes don't need takes torch
            stack.enter_context(patch.object(launching, "_meet", lambda where: (None, 29500)))
        return launching.launch(["work", case, folder], where)


def work(case: str, folder: Path) -> int:
    rank, local, told = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), []
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(signum, lambda number, frame: told.append(number))
    (folder / f"pid-{rank}").write_text(str(os.getpid()))
    print(f"out of {rank} of {os.environ['WORLD_SIZE']}")
    print(f"library's words of {rank}", file=sys.stderr, flush=True)
    if case == "fine":
        return 0
    if case.startswith("fails") and local == 1:
        print("sft: no such thing\nsft: no such thing", file=sys.stderr, flush=True)
        return int(case.removeprefix("fails"))
    if case == "killed" and local == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + 40
    while not told and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(2.5 * (case == "saves" and rank == 0))  # the first process saves longer than the others
    (folder / f"saved-{rank}").touch()
    return 128 + told[0] if told else 5


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    sys.exit(launch(int(rest[0]), rest[1], rest[2]) if kind == "launch" else work(rest[0], Path(rest[1])))
