"""Processes that share work through a folder which all of them see: each takes what is left, until nothing is.

The folder, and not the launcher's key-value store: that lives in one of the processes and dies with it, while the run's
folder has to be shared anyway, since the samples go there, and outlives every process. Nothing here is a collective, so
no time-out runs while one process works for hours. What a process that died had taken is taken over by the others; one
that was only taken for dead does no harm, since what it does is then done twice, alike.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sft.utils.distributed import WAIT
from sft.utils.errors import UserError, sentence
from sft.utils.files import SEAL, read_sealed, sha256_json, write_sealed

BEAT = 1.0
"""Seconds between two signs of life."""

LOST = 60.0
"""Seconds without one after which a process of another machine counts as dead: a network file system may show an old
file for a while. On one machine its lock tells at once."""

STUCK = WAIT.total_seconds()
"""Seconds in which a process that gives signs of life has to get on with its work."""

LOOK = 0.05
"""Seconds between two looks at what the others do, for each of them."""

NOBODY = -1

_END, _STOPPED, _CLAIMS = "end.json", "stopped", "claims"


@dataclass
class _Heard:
    """What another process has last told, and when, on this process's clock, its beat and its step were new."""

    state: dict[str, Any]
    beat: float
    step: float


class Crew:
    """The processes that share a folder: who is there, who has taken what, what is finished, and what went wrong.

    As a context it gives signs of life. An error that ends it here ends it on all, with the same sentence and
    `from_rank`: of several the first. It is left by all together, once `results` is there.

    Args:
        folder: of this work alone. A process that is alone writes nothing.
        rank: this process.
        ranks: all processes.

    Attributes:
        lost: the processes that have died, as far as this one has seen; at the end, on all, as the one at the end saw.
        looks: how often this process has looked.
        results: what was given to `end`, on whichever process.
    """

    def __init__(self, folder: Path, rank: int, ranks: Iterable[int]) -> None:
        now = time.monotonic()
        self.folder, self.rank = folder, rank
        self.others = {other: _Heard({}, now, now) for other in ranks if other != rank}
        self.lost: set[int] = set()
        self.looks = 0
        self.results: dict[str, Any] | None = None
        self._state: dict[str, Any] = {"beat": 0, "step": 0, "left": False, "finished": {}, "counts": {}}
        self._writing = threading.Lock()
        self._over = threading.Event()
        self._looked = now

    def __enter__(self) -> Crew:
        if self.others:
            (self.folder / _CLAIMS).mkdir(parents=True, exist_ok=True)
            self._held = open(self._lock_of(self.rank), "w", encoding="utf-8")
            self._state |= {"machine": _machine(), "locked": _lock(self._held)}
            self._tell()
            self._thread = threading.Thread(target=self._live, name="signs of life", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.others:
            return
        try:
            self._leave() if error is None else self._fail(error)
        finally:
            self._fall_silent()
            self._held.close()

    # ---- what there is to do ----

    def take(self, name: str) -> bool:
        """Whether `name`, which this process asks for once only, is its own: one process gets it."""
        return not self.others or _create(self.folder / _CLAIMS / name, self.rank)

    def owner(self, name: str) -> int | None:
        """Whose `name` is; None: nobody's. NOBODY where a process died, or is, just about to say that it is its own."""
        return _owner(self.folder / _CLAIMS / name)

    def finish(self, work: str, unit: int) -> None:
        """A unit is done, and what came of it is on the disk."""
        with self._writing:
            self._state["finished"].setdefault(work, []).append(unit)

    def finished(self, work: str) -> set[int]:
        """The units that any process has done."""
        return {unit for state in self._states() for unit in state["finished"].get(work, ())}

    def count(self, work: str, *numbers: int) -> None:
        """Add to the numbers that this process tells of its work."""
        with self._writing:
            before = self._state["counts"].get(work, [0] * len(numbers))
            self._state["counts"][work] = [a + b for a, b in zip(before, numbers, strict=True)]

    def counts(self, work: str) -> list[int]:
        """The sums of these numbers over all processes; nothing where none told any."""
        told = [state["counts"][work] for state in self._states() if work in state["counts"]]
        return [sum(column) for column in zip(*told, strict=True)]

    def leads(self) -> bool:
        """Whether this process does what one does for all: the first that lives."""
        return all(other > self.rank or other in self.lost for other in self.others)

    def end(self, results: dict[str, Any]) -> None:
        """Nothing is left to do; `results` go to all."""
        if self.others:
            write_sealed(self.folder / _END, {"results": results, "lost": sorted(self.lost)})
        self.results = results

    # ---- who is there ----

    def step(self) -> None:
        """This process gets on with its work. Now and then it looks at the others: see `look`."""
        self._state["step"] += 1
        if self.others and time.monotonic() - self._looked > LOOK * len(self.others):
            self.look()

    def pause(self) -> None:
        """Wait a moment, and look again."""
        with suppress(FileNotFoundError):
            self._tell()
        time.sleep(LOOK * (1 + len(self.others)))
        self._state["step"] += 1
        self.look()

    def look(self) -> None:
        """See what the others do. Raises what one of them failed with, and UserError where they have gone on without
        this process."""
        self.looks, self._looked = self.looks + 1, time.monotonic()
        # A listing, not a look at the names: network file systems remember for a while that a name wasn't there.
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            names = []
        end = read_sealed(self.folder / _END) if _END in names else None
        if not names or (end is not None and self.rank in end["lost"]):
            raise UserError(
                f"Rank {self.rank} wasn't heard of for so long that the others have done its part and gone on: start "
                "all processes again; the same command continues."
            )
        if _STOPPED in names and (failure := self._failure()) is not None:
            raise failure
        for other, heard in self.others.items():
            self._hear(other, heard)
        if end is not None:
            self.results, self.lost = end["results"], set(end["lost"])
        else:
            self.lost = {other for other, heard in self.others.items() if self._is_lost(other, heard)}

    def _hear(self, other: int, heard: _Heard) -> None:
        state = read_sealed(self._told_by(other))
        if state is None:
            return  # not there yet, or being written
        now, before = time.monotonic(), heard.state
        heard.beat = now if state["beat"] != before.get("beat") else heard.beat
        heard.step = now if state["step"] != before.get("step") else heard.step
        heard.state = state

    def _is_lost(self, other: int, heard: _Heard) -> bool:
        state, now = heard.state, time.monotonic()
        if state.get("left"):
            return False
        if state.get("locked") and state["machine"] == self._state["machine"]:
            dead = not _is_locked(self._lock_of(other))
        else:
            dead = now - heard.beat > LOST
        return dead or now - heard.step > STUCK

    def _states(self) -> list[dict[str, Any]]:
        return [self._state, *(heard.state for heard in self.others.values() if heard.state)]

    def _live(self) -> None:
        while not self._over.wait(timeout=BEAT):
            with suppress(OSError):  # a sign that can't be given isn't seen: the others know what that means
                self._tell()

    def _tell(self) -> None:
        with self._writing:
            self._state["beat"] += 1
            state = dict(self._state)
            text = json.dumps({**state, SEAL: sha256_json(state)}).encode()
            # The same file all the time: in place of a new one a network file system may go on showing the old one.
            with os.fdopen(os.open(self._told_by(self.rank), os.O_RDWR | os.O_CREAT, 0o644), "r+b") as handle:
                handle.write(text)
                handle.truncate()

    def _told_by(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}.json"

    def _lock_of(self, rank: int) -> Path:
        return self.folder / f"rank-{rank:05}.lock"

    # ---- the end ----

    def _fall_silent(self) -> None:
        self._over.set()
        self._thread.join(timeout=BEAT)

    def _leave(self) -> None:
        self._fall_silent()  # a late sign of life would be a file in a folder that is being removed
        self._state["left"] = True
        self._tell()
        staying = {other: heard for other, heard in self.others.items() if other not in self.lost}
        while self.leads() and staying:
            for other, heard in staying.items():
                self._hear(other, heard)
                if not heard.state.get("left") and self._is_lost(other, heard):
                    return  # with the results left for it, should it live
            staying = {other: heard for other, heard in staying.items() if not heard.state.get("left")}
            time.sleep(LOOK if staying else 0)
        if self.leads():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _fail(self, error: BaseException) -> None:
        """Tell the others what ends the work. Where one of them was first, its error is raised."""
        if error.__dict__.get("from_rank", self.rank) != self.rank:
            return
        interrupted = isinstance(error, KeyboardInterrupt)
        told = {"text": sentence(error), "exit_code": getattr(error, "exit_code", 1), "interrupted": interrupted}
        with suppress(OSError):  # on a full disk, say: then this process counts as lost
            write_sealed(self._error_of(self.rank), told)
            if not _create(self.folder / _STOPPED, self.rank) and (failure := self._failure()) is not None:
                raise failure from error

    def _failure(self) -> BaseException | None:
        rank = _owner(self.folder / _STOPPED)
        told = None if rank in (None, NOBODY) else read_sealed(self._error_of(rank))
        if told is None:
            return None
        error = KeyboardInterrupt(told["text"]) if told["interrupted"] else UserError(told["text"])
        error.__dict__.update(exit_code=told["exit_code"], from_rank=rank)
        return error

    def _error_of(self, rank: int) -> Path:
        return self.folder / f"error-{rank:05}.json"


def _create(path: Path, rank: int) -> bool:
    """Whether this process is the one that makes a file, which says so."""
    try:
        with open(path, "x", encoding="ascii") as handle:
            handle.write(str(rank))
    except FileExistsError:
        return False
    return True


def _owner(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii") or NOBODY)
    except FileNotFoundError:
        return None


def _machine() -> str:
    """What tells machines apart, and one machine's containers."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        boot = ""
    return f"{socket.gethostname()} {boot}"


def _lock(handle: IO[str]) -> bool:
    """Lock a file for as long as this process lives; whether this file system can."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _is_locked(path: Path) -> bool:
    try:
        with open(path, encoding="utf-8") as handle:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False
