"""The processes that compare as mathematics: started when needed, killed when slow, replaced when lost."""

from __future__ import annotations

import json
import os
import queue
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sft.answers.worker import DIED, WALL_SLACK, Answer
from sft.utils.errors import UserError

_WORKER = Path(__file__).with_name("worker.py")
_MEMORY_LIMIT = 4 << 30
_START_LIMIT = 120.0
RESULT_LIMIT = 3600.0
"""Seconds after which waiting for a verdict is given up. Each comparison has a limit of its own, far below this."""
_NOT_STARTED = f"{DIED} (not started)"


_spare: list[_Worker] = []
_keepers = 0


@contextmanager
def kept_workers() -> Iterator[None]:
    """Inside, a pool that ends leaves its processes, which take a second or more to start, to the pools after it."""
    global _keepers
    _keepers += 1
    try:
        yield
    finally:
        _keepers -= 1
        while not _keepers and _spare:
            _spare.pop().close()


def _worker() -> _Worker:
    """A process that another pool has left, or a new one."""
    try:
        return _spare.pop()
    except IndexError:
        return _Worker()


class _Worker:
    """One verifying process. It is used by one thread at a time."""

    def __init__(self) -> None:
        # -P: the script's folder must not enter sys.path, where its modules would shadow others.
        # The order of sets of names decides how sympy simplifies: the same in every process.
        threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER), str(_MEMORY_LIMIT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **threads, "PYTHONHASHSEED": "0"},
        )
        self.ready = False
        self._task = 0
        self._unread = b""

    def ask(self, question: dict[str, Any], limit: float) -> Answer | None:
        """(status, reason, answer); None when the process doesn't answer any more."""
        if not self.ready:
            self.ready = self._read_line(time.monotonic() + _START_LIMIT) == b"ready"
            if not self.ready:
                return None
        self._task += 1
        task = json.dumps({"task": self._task, "limit": limit, **question}).encode() + b"\n"
        deadline = time.monotonic() + WALL_SLACK * limit + 5.0
        told = self._write(task)
        while told and (line := self._read_line(deadline)) is not None:
            reply = json.loads(line)
            # What was asked again may be answered twice; the second reply belongs to no task.
            if reply["task"] == self._task:
                return reply["status"], reply["reason"], reply["answer"]
            if reply["task"] == 0:  # a fork died that had noted none: before, or with its reply unsent
                told = self._write(task)
        return None

    def _write(self, line: bytes) -> bool:
        """Whether the process took the line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return False
        return True

    def _read_line(self, deadline: float) -> bytes | None:
        """A line of the process's output, or None when it ends or the clock passes `deadline`."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        while b"\n" not in self._unread:
            ready, _, _ = select.select([descriptor], [], [], max(deadline - time.monotonic(), 0))
            chunk = os.read(descriptor, 65536) if ready else b""
            if not chunk:
                return None
            self._unread += chunk
        line, _, self._unread = self._unread.partition(b"\n")
        return line

    def close(self) -> None:
        """Kill the process; what it forked dies with it."""
        self.process.kill()
        self.process.wait(timeout=60)
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                # A write that the process never read is still in the pipe; closing must not try to deliver it.
                try:
                    pipe.close()
                except OSError:
                    continue


class Pool:
    """Asks in worker processes; a comparison that reaches the time limit is killed.

    Args:
        timeout: seconds of CPU time one comparison may take (ten times as many on the clock).
        workers: how many processes; they start with the first question.
    """

    def __init__(self, timeout: float, workers: int) -> None:
        self.timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._workers = workers
        self._busy: set[_Worker] = set()
        self._stopped = False
        self.replaced = 0

    def submit(self, question: dict[str, Any]) -> Future[Answer]:
        """(status, reason, answer) of a question, in the future. UserError where no process can be started at all."""
        return self._threads.submit(self._answer, question)

    def _answer(self, question: dict[str, Any]) -> Answer:
        answer = self._ask(question)
        if answer[1].startswith(DIED) and not self._stopped:
            # Something else may have ended it (the machine short of memory, a user); if not, it will die again.
            answer = self._ask(question)
        if answer[1] == _NOT_STARTED and not self._stopped:
            command = f"{sys.executable} -P {_WORKER} {_MEMORY_LIMIT}"
            raise UserError(f"Answers can't be checked: the verifying process doesn't start; `{command}` shows why.")
        return answer

    def _ask(self, question: dict[str, Any]) -> Answer:
        worker, answer = self._idle.get(timeout=RESULT_LIMIT), None
        try:
            worker = worker or _worker()
            self._busy.add(worker)
            answer = worker.ask(question, self.timeout)
        finally:
            # Whatever happens, the place of the process is given back: others, and `close`, wait for it.
            if worker is not None:
                self._busy.discard(worker)
                if answer is None:
                    worker.close()
            self._idle.put(worker if answer is not None else None)
        if answer is None:
            self.replaced += 1
            return "undecided", f"{DIED} (no reply)" if worker.ready else _NOT_STARTED, None
        return answer

    def close(self, *, at_once: bool = False) -> None:
        """Stop the workers. Checks that have not begun are dropped; those under way are too with `at_once`."""
        self._stopped = True
        if at_once:
            for worker in list(self._busy):
                worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._workers):
            idle = self._idle.get(timeout=RESULT_LIMIT)
            if idle is not None and _keepers:
                _spare.append(idle)
            elif idle is not None:
                idle.close()
