"""A command as several processes of this machine: started, watched, told of signals, and ended together.

The processes get what torchrun gives its own (the variables, and a key-value store that outlives each of them), so all
that holds under torchrun holds here. It isn't torchrun's agent because that ends with a status of its own, gives a run
that saves on a signal half a minute, and ends it at the first process that leaves, while others may be writing yet.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from sft.run.placement import Placement
from sft.utils.errors import UserError, first_line, shown
from sft.utils.progress import end_line
from sft.utils.say import leave_lost_terminal
from sft.utils.signals import on_parents_death

HANDED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}
"""What arrives here -> what the processes are told. A terminal that goes away is a reason to save."""

STOPPED = tuple(128 + signum for signum in HANDED_ON.values())
"""How a process ends that was told to: no failure, and others may have more to save."""

LOOK = 0.05
"""Seconds between two looks at the processes."""

ALONE = 15.0
"""Seconds in which the others are to end by themselves when a process has failed: most are told of it."""

ENDING = 30.0
"""Seconds from SIGTERM to SIGKILL for those that haven't."""

NODES = timedelta(minutes=10)
"""How long nodes wait for each other at the start, and the first one for the others at the end."""

SAVING = 600.0
"""Seconds that the others have to end in when a process has ended on a signal that didn't come through here."""

LAST_LINES = 20


@dataclass
class _Worker:
    """One process, and what it has said, where that isn't the terminal."""

    rank: int
    process: subprocess.Popen[bytes]
    said: Path | None
    code: int | None = None
    ended_by_us: bool = False


def launch(words: Sequence[str], where: Placement) -> int:
    """Run `sft WORDS` as the processes of `where`; the run's exit status.

    The first process of this machine has the terminal. What another one says when it fails is told here, once. Signals
    are handed on, and the processes then have all the time that saving takes. When one fails, the others end, too, on
    all nodes. Raises UserError where the nodes don't find each other.
    """
    with _signals() as arrived, tempfile.TemporaryDirectory(prefix="sft-ranks-") as scratch:
        store, port = _meet(where)
        group = _Group(list(words), where, port, Path(scratch))
        other_nodes = _OtherNodes(store, where)
        try:
            group.start()
            while group.runs():
                time.sleep(LOOK)
                while arrived:
                    group.tell(arrived.pop(0))
                group.look()
                if other_nodes.failed(group.failed):
                    group.end("another node's processes have failed")
        finally:
            group.kill()
        other_nodes.leave()
        return group.status()


class _Group:
    """The processes of this machine."""

    def __init__(self, words: list[str], where: Placement, port: int, scratch: Path) -> None:
        self._words, self._where, self._port, self._scratch = words, where, port, scratch
        self._workers: list[_Worker] = []
        self._told: int | None = None
        self._deadline: float | None = None
        self._terminated = False
        self.failed = False

    def start(self) -> None:
        """Start them all. Each has a session of its own, so that Ctrl-C reaches them from here alone."""
        run = os.environ.get("TORCHELASTIC_RUN_ID") or f"sft-{secrets.token_hex(4)}"
        for local in range(self._where.local):
            said = self._scratch / str(local) if local else None
            with open(said or os.devnull, "wb") as handle:
                output: Any = {"stdout": handle, "stderr": handle, "stdin": subprocess.DEVNULL} if local else {}
                environment = process_environment(self._where, local, self._port, run)
                process = subprocess.Popen(
                    [*_python(), *self._words],
                    env={**os.environ, **environment},
                    start_new_session=True,
                    # A launcher that is killed leaves nobody behind: they are to save, and go.
                    preexec_fn=partial(on_parents_death, signal.SIGTERM),
                    **output,
                )
            self._workers.append(_Worker(int(environment["RANK"]), process, said))

    def runs(self) -> bool:
        """Whether one is at work still."""
        return any(worker.code is None for worker in self._workers)

    def tell(self, signum: int) -> None:
        """Hand a signal on."""
        self._told = HANDED_ON[signal.Signals(signum)]
        self._send(self._told)

    def look(self) -> None:
        """See who has ended; end the others some time after a failure."""
        for worker in self._workers:
            if worker.code is None and (code := worker.process.poll()) is not None:
                worker.code = code
                if code in STOPPED and self._told is None and self._deadline is None:
                    self._deadline = time.monotonic() + SAVING
                elif code != 0 and code not in STOPPED and not worker.ended_by_us and not self._is_told(code):
                    self._fail(worker)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._send(signal.SIGKILL if self._terminated else signal.SIGTERM, ours=True)
            self._terminated, self._deadline = True, time.monotonic() + ENDING

    def end(self, why: str) -> None:
        """Have all end that haven't, for a reason that lies elsewhere."""
        if self._deadline is None:
            _say(f"{why}: ending those of this one")
            self.failed, self._deadline = True, time.monotonic()

    def kill(self) -> None:
        """Leave none behind."""
        for worker in self._workers:
            if worker.code is None:
                worker.process.kill()
                with suppress(subprocess.TimeoutExpired):
                    worker.process.wait(timeout=ENDING)

    def status(self) -> int:
        """The run's exit status: the first process's own, else that of the first that failed; 1 for one that was killed
        by a signal that nobody sent through here."""
        own = [worker for worker in self._workers if worker.code and not worker.ended_by_us]
        if not own:
            return 1 if self.failed else 0
        code = own[0].code or 1
        if code > 0:
            return code
        return 128 - code if self._is_told(code) else 1

    def _is_told(self, code: int) -> bool:
        return self._told is not None and code in (-self._told, -signal.SIGKILL)

    def _fail(self, worker: _Worker) -> None:
        self.failed = True
        soon = time.monotonic() + ALONE
        self._deadline = soon if self._deadline is None else min(soon, self._deadline)
        assert worker.code is not None
        text = worker.said.read_text(encoding="utf-8", errors="backslashreplace") if worker.said else ""
        lines = text.splitlines()
        told = [line.removeprefix("sft: ") for line in dict.fromkeys(lines) if line.startswith("sft: ")]
        for line in lines if "--debug" in self._words else told or lines[-LAST_LINES:]:
            _say(f"rank {worker.rank}: {shown(line)}")
        if worker.code < 0:
            name = signal.Signals(-worker.code).name
            perhaps = " (the system does so where memory runs out)" if name == "SIGKILL" else ""
            _say(f"rank {worker.rank} was ended by {name}{perhaps}")

    def _send(self, signum: int, *, ours: bool = False) -> None:
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.ended_by_us |= ours
                with suppress(ProcessLookupError):
                    worker.process.send_signal(signum)


def process_environment(where: Placement, local: int, port: int, run: str) -> dict[str, str]:
    """What torchrun sets for the process `local` of this machine."""
    cores = len(os.sched_getaffinity(0))
    values: dict[str, Any] = {
        "RANK": where.node * where.local + local,
        "WORLD_SIZE": where.nodes * where.local,
        "LOCAL_RANK": local,
        "LOCAL_WORLD_SIZE": where.local,
        "GROUP_RANK": where.node,
        "MASTER_ADDR": where.address,
        "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": run,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "TORCHELASTIC_MAX_RESTARTS": 0,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        # It warns of each slice of a wait; from the start on, since the first wait comes before `quiet_libraries`.
        "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # Threads of processes that share cores wait for each other.
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", max(1, cores // where.local)),
    }
    return {name: str(value) for name, value in values.items()}


def _python() -> list[str]:
    """This interpreter on this package; a folder called sft where the command is given isn't taken for it."""
    import sft

    home = Path(str(sft.__file__)).resolve().parents[1]
    return [sys.executable, *([] if home == Path.cwd() else ["-P"]), "-m", "sft"]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """What has arrived, and isn't handed on yet."""
    arrived: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        arrived.append(signum)
        leave_lost_terminal()

    before = {}
    for signum in HANDED_ON:
        if signum in (signal.SIGINT, signal.SIGHUP) and signal.getsignal(signum) == signal.SIG_IGN:
            continue  # nohup and background jobs ask for that
        before[signum] = signal.signal(signum, note)
    try:
        yield arrived
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _say(text: str) -> None:
    end_line()
    print(f"sft: {text}", file=sys.stderr, flush=True)


# ---- nodes ----


def _meet(where: Placement) -> tuple[Any, int]:
    """The store through which all processes talk, hosted here on the first node, and its port."""
    from torch.distributed import TCPStore

    try:
        store = TCPStore(
            where.address,
            where.port,
            is_master=where.node == 0,
            wait_for_workers=False,
            timeout=NODES,
            multi_tenant=False,
        )
    except Exception as error:  # of torch's own, by the system's error
        place = f"{where.address}:{where.port}"
        why = "listened at" if where.node == 0 else "reached"
        raise UserError(
            f"{place} can't be {why} ({first_line(error)}): MASTER_ADDR has to be the first node's name, and "
            "MASTER_PORT free there and let through."
        ) from error
    if where.nodes > 1:
        _check_alike(store, where)
    return store, store.port


def _check_alike(store: Any, where: Placement) -> None:
    """Refuse nodes that would start different numbers of processes, or two with one number."""
    store.set(f"sft-node/{where.node}", f"{where.local} of {where.nodes}")
    if store.add(f"sft-node-count/{where.node}", 1) > 1:
        raise UserError(f"Two nodes have NODE_RANK {where.node}: count them from 0.")
    first = store.get("sft-node/0").decode()
    if first != f"{where.local} of {where.nodes}":
        raise UserError(
            f"Node {where.node} starts {where.local} processes of {where.nodes} nodes, the first one {first}: set "
            "--num_processes and NNODES alike on all."
        )


class _OtherNodes:
    """What launchers of several nodes tell each other through the store: that one's processes have failed, and that
    one has ended."""

    def __init__(self, store: Any, where: Placement) -> None:
        self._store, self._where = store, where
        self._told = False
        self._next = 0.0

    def failed(self, here: bool) -> bool:
        """Whether another node's processes have failed, or the first node is gone; tell them of a failure `here`."""
        if self._where.nodes == 1 or self._told or time.monotonic() < self._next:
            return False
        self._next = time.monotonic() + 1.0
        try:
            if here:
                self._store.set("sft-failed", str(self._where.node))
                self._told = True
                return False
            return bool(self._store.check(["sft-failed"]))
        except Exception:  # the store, and with it the first node, is gone
            return True

    def leave(self) -> None:
        """The store stays until all have ended."""
        if self._where.nodes == 1:
            return
        with suppress(Exception):  # the first node is gone, which was told
            self._store.add("sft-left", 1)
            deadline = time.monotonic() + NODES.total_seconds()
            while self._where.node == 0 and self._store.add("sft-left", 0) < self._where.nodes:
                if time.monotonic() > deadline:
                    break
                time.sleep(LOOK)
