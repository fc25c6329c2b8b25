"""Ctrl-C and SIGTERM during training: finish the step, save a whole checkpoint, stop; a second one stops at once."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any

from sft.utils.errors import UserError


class Interrupted(UserError):  # noqa: N818 (nothing went wrong)
    """Training stopped on a signal after saving; `exit_code` is 130 for SIGINT and 143 for SIGTERM."""

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopSignals:
    """Context in which SIGINT and SIGTERM set `received` instead of killing the process.

    Handlers can only be installed in the main thread; elsewhere the context does nothing. They are put back on exit.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        self.received = signum
        name = signal.Signals(signum).name
        # os.write: a handler may run in the middle of a print.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{name}: saving after this step.\n".encode())
