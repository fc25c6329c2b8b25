"""The signals that ask a process to stop, and the one that comes when its parent dies."""

from __future__ import annotations

import ctypes
import signal
from contextlib import suppress

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_LIBC = ctypes.CDLL(None)
_PR_SET_PDEATHSIG = 1


def on_parents_death(signum: int) -> None:
    """Have `signum` sent here when the process that started this one dies, however it does: on Linux, and there up to
    once for each thread of it."""
    with suppress(AttributeError):  # not Linux
        _LIBC.prctl(_PR_SET_PDEATHSIG, signum)
