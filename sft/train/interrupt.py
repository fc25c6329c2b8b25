"""Ctrl-C, SIGTERM, SIGUSR1 and a terminal that goes away (SIGHUP, taken as a SIGTERM), for the whole of a run.

Where work is lost when it stops at once (a stage's steps, and what it hands on) a signal is noted, and the run stops as
soon as everything is saved; anywhere else it ends the run as Ctrl-C does, and what was being made is made again. Slurm
sends SIGUSR1 before the time limit when asked to. A second signal (see ECHO) ends the process at once. A signal that
was ignored when the process began stays ignored (nohup and background jobs ask for that), but for SIGTERM and SIGUSR1.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from sft.utils.distributed import is_main
from sft.utils.errors import UserError
from sft.utils.say import leave_lost_terminal
from sft.utils.signals import STOP_SIGNALS, on_parents_death

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Set for the processes that torchrun starts."""

AGAIN = 0.02
"""Seconds until a signal is handled again that came where an exception would be lost."""

ECHO = 2.0
"""Seconds in which a process of torchrun may hear of one signal twice: from the sender, and handed on by torchrun."""


class Interrupted(UserError):  # noqa: N818 (nothing went wrong)
    """Stopped on a signal after saving; `exit_code` is 130 for SIGINT, 143 for SIGTERM, 138 for SIGUSR1."""

    from_rank = 0  # it is raised on all processes, and told by the main one

    def __init__(self, message: str, signum: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class Stopped(KeyboardInterrupt):
    """A signal arrived where nothing has to be saved. Libraries that end in order on Ctrl-C do so on this."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


class StopSignals:
    """What the run knows about signals; see `stop_signals`. `received` is the first one that arrived."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._saving = 0
        self._since: float | None = None  # when this process heard of one itself
        self._again: threading.Timer | None = None
        self._process = os.getpid()
        self._previous: dict[int, Any] = {}

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Signals are only noted in here: the caller looks at `received`, saves, and calls `check`."""
        self._saving += 1
        try:
            yield
        finally:
            self._saving -= 1

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Inside `saving`, where the caller can leave off at any place: a signal raises Stopped at once."""
        saving, self._saving = self._saving, 0
        try:
            self.check()
            yield
        finally:
            self._saving = saving

    def check(self) -> None:
        """Raise Stopped when a signal has arrived: also one that a library has swallowed."""
        if self.received is not None:
            raise Stopped(self.received)

    def learn(self, signum: int) -> None:
        """Another process has received it: all stop. What comes to this process later is its first, and no second."""
        self.received = signum

    def forget(self) -> None:
        """The signal that arrived has been dealt with, and the run goes on (`sft chat` stops an answer on Ctrl-C)."""
        self.received = self._since = None

    def install(self) -> None:
        """Take the signals over."""
        for signum in STOP_SIGNALS:
            if signum in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(signum) == signal.SIG_IGN:
                continue
            self._previous[signum] = signal.signal(signum, self._handle)
        if LAUNCHED in os.environ:
            # A launcher that is killed (by a SIGUSR1, say, which it does not hand on unasked) leaves its processes
            # behind. They are to save and go, or they would train on beside the next run.
            on_parents_death(signal.SIGTERM)

    def restore(self) -> None:
        """Put the handlers that were there before back.

        Not where torchrun's signal ends the process: its echo would end it sooner, before it has told why. (A launcher
        that dies brings one for each of its threads.)
        """
        if self._again is not None:
            self._again.cancel()
        if self.received is not None and LAUNCHED in os.environ:
            return
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A fork of the run, which has nothing to save.
            signal.default_int_handler(signum, frame) if signum == signal.SIGINT else _die(signum)
        if self._since is not None and self._again is None:
            if signum == signal.SIGHUP:
                return  # nobody asks twice: a shell and the system both tell of a terminal, systemd after a SIGTERM
            # Another signal is no echo, but for the SIGTERM of a launcher's death, which the first may have brought.
            echo = LAUNCHED in os.environ and time.monotonic() - self._since < ECHO
            if echo and signum in (self.received, signal.SIGTERM):
                return
            _die(signum)
        learned = self._since is None and self.received is not None
        self._since, self._again = time.monotonic(), None
        leave_lost_terminal()
        if learned:
            return
        self.received = signal.SIGTERM if signum == signal.SIGHUP else signum
        if not self._saving:
            if _loses_exceptions(frame):
                self._again = threading.Timer(AGAIN, os.kill, (self._process, signum))
                self._again.start()
                return
            raise Stopped(self.received)
        if not is_main():
            return
        name = signal.Signals(signum).name
        # os.write: a handler may run in the middle of a print.
        # A second one that comes sooner may be the first one's echo.
        later = f", {ECHO:g} seconds from now or later," if LAUNCHED in os.environ else ""
        text = f"\n{name}: saving, then stopping; a second signal{later} stops at once.\n"
        with suppress(OSError):  # the terminal is gone
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, text.encode())


def _loses_exceptions(frame: FrameType | None) -> bool:
    """Whether `frame` is in a finalizer or a weak reference's callback: what is raised there is printed, and lost."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or Path(code.co_filename).name in ("weakref.py", "_weakrefset.py"):
            return True
        frame = frame.f_back
    return False


def _end_the_launcher() -> None:
    """Let a torchrun that would start its processes again (--max_restarts) end: a SIGUSR1 has told them to stop. A
    process for each node tells its own. (A SIGTERM is what torchrun itself ends the others with before a start.)"""
    left = int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - int(
        os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    )
    if LAUNCHED in os.environ and os.environ.get("LOCAL_RANK") == "0" and left > 0 and os.getppid() > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # which comes back from there, before this process has told why
        os.kill(os.getppid(), signal.SIGTERM)


def leave_signals_to_the_run() -> None:
    """For a process that the run needs to save (a loader's worker): a signal to the whole group doesn't end it."""
    for signum in STOP_SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def _die(signum: int) -> None:
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # a container's first process isn't ended by a signal of its own


_active: StopSignals | None = None


@contextmanager
def stop_signals() -> Iterator[StopSignals]:
    """The run's signals. The outermost context takes them over and puts them back; inner ones share it.

    Handlers can only be set in the main thread; in another one nothing ever arrives.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield StopSignals()
        return
    if _active is not None:
        yield _active
        return
    _active = StopSignals()
    try:
        _active.install()
        yield _active
    finally:
        _active.restore()
        if _active.received == signal.SIGUSR1:
            _end_the_launcher()
        _active = None
