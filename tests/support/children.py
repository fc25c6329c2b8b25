"""Child processes: their signals are set whatever this process was started with, and no wait for them is endless."""

from __future__ import annotations

import select
import signal
import subprocess
import time
from collections.abc import Callable
from types import FrameType
from typing import IO, Any


def give_children_their_signals() -> None:
    """Let children be born with their signals in order, also where this process was told to ignore some.

    A shell's background jobs and nohup start with signals ignored, and so would every child; a handler is not handed
    on. This process goes on ignoring what it was told to ignore.
    """

    def ignore(number: int, frame: FrameType | None) -> None:
        """As asked for by whoever started the tests."""

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, ignore)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1})


def wait_until(
    condition: Callable[[], bool], seconds: float, process: subprocess.Popen[Any] | None = None, pause: float = 0.01
) -> None:
    """Until `condition` holds; fails after `seconds`, or when `process` ends before."""
    limit = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, f"the process has ended with {process.returncode}"
        assert time.monotonic() < limit, f"not within {seconds:.0f} seconds"
        time.sleep(pause)


def read_line(stream: IO[str] | None, seconds: float = 60.0) -> str:
    """The next line of a child's output; fails when it doesn't come in time."""
    assert stream is not None
    ready, _, _ = select.select([stream], [], [], seconds)
    assert ready, f"no line within {seconds:.0f} seconds"
    return stream.readline()  # bounded: there is something to read
