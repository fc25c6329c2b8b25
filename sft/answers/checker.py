"""The final answer in a completion, and whether it is the right one."""

from __future__ import annotations

import atexit
import json
import os
import queue
import re
import select
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Literal

from sft.answers.choices import judge_choice
from sft.answers.worker import DIED, WALL_SLACK
from sft.utils.errors import UserError

Status = Literal["right", "wrong", "undecided"]

_WORKER = Path(__file__).with_name("worker.py")
_MEMORY_LIMIT = 4 << 30
_START_LIMIT = 120.0
RESULT_LIMIT = 3600.0
"""Seconds after which waiting for a verdict is given up. Each comparison has a limit of its own, far below this."""
# Bounds on what is looked at, so that extraction stays linear on any text.
_LONGEST_ANSWER = 10_000
_MOST_BOXES = 50
_TAIL = 4_000

_NOT_STARTED = f"{DIED} (not started)"

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_HASHES = re.compile(r"####[ \t]*([^\n]+)")
_A_COLON = re.compile(r"^[ \t]*A:[ \t]*([^\n]+)", re.MULTILINE)
_NUMBER = re.compile(r"[-+]?(?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d+)?")


@dataclass(frozen=True)
class Verdict:
    """What became of one answer: `reason` says how it was decided, or why not; `answer` is what was extracted."""

    status: Status
    reason: str
    answer: str | None = None


def extract_answer(text: str) -> str | None:
    r"""The explicit final answer of a completion, or None.

    Looks after the last `</think>` if there is one: the last non-empty \boxed{} with balanced braces, else what follows
    the last '####', else the last line 'A: ...'.
    """
    text = text.rpartition("</think>")[2]
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    for pattern in (_HASHES, _A_COLON):
        found = pattern.findall(text)
        if found and found[-1].strip():
            return found[-1].strip()[:_LONGEST_ANSWER]
    return None


def last_boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...} that has balanced braces and isn't empty, or None."""
    starts = [match.end() for match in _BOX.finditer(text)]
    for start in reversed(starts[-_MOST_BOXES:]):
        content = _balanced(text, start)
        if content:
            return content
    return None


def _balanced(text: str, start: int) -> str | None:
    """The text from `start` to the brace that closes the one before `start`; escaped braces don't count."""
    depth, position = 1, start
    end = min(len(text), start + _LONGEST_ANSWER)
    while position < end:
        character = text[position]
        if character == "\\":
            position += 1
        elif character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[start:position].strip()
        position += 1
    return None


def gold_answer(value: object) -> str:
    r"""The answer in a gold column: after '####', the last \boxed{}, after 'A:', or the value as it stands."""
    text = str(value).strip()
    return extract_answer(text) or text


def plain_number(text: str) -> Fraction | None:
    """The value of a plain decimal number ('$1,234.50', '-3', '3.0'), or None for anything else."""
    text = text.strip().strip("$").replace("\\$", "").replace("\\!", "").replace("{,}", ",").strip().rstrip(".")
    text = text.removeprefix("$").replace("-$", "-").strip()
    if not 0 < len(text) <= 300 or not any(c.isdigit() for c in text) or not _NUMBER.fullmatch(text):
        return None
    return Fraction(text.replace(",", "")) if text.isascii() else None


def quick_verdict(answer: str, gold: str) -> Verdict | None:
    """The verdict where none can doubt it: equal texts, plain numbers, letters of a choice. Else None."""
    if answer.strip() == gold.strip():
        return Verdict("right", "same text", answer)
    mine, theirs = plain_number(answer), plain_number(gold)
    if mine is not None and theirs is not None:
        if mine == theirs:
            return Verdict("right", "same number", answer)
        # Decimals may be rounded differently: math-verify knows how far apart is still equal.
        if mine.denominator == 1 and theirs.denominator == 1:
            return Verdict("wrong", "other number", answer)
    if re.fullmatch(r"[A-J]", gold.strip()) and judge_choice(answer, gold.strip(), {})[0] == "right":
        return Verdict("right", "same choice", answer)
    return None


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

    def ask(self, prediction: str, gold: str, free_form: bool, limit: float) -> Verdict | None:
        """The verdict; None when the process doesn't answer any more."""
        if not self.ready:
            self.ready = self._read_line(time.monotonic() + _START_LIMIT) == b"ready"
            if not self.ready:
                return None
        self._task += 1
        task = {"task": self._task, "prediction": prediction, "gold": gold, "free_form": free_form, "limit": limit}
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:
            return None
        deadline = time.monotonic() + WALL_SLACK * limit + 5.0
        while (line := self._read_line(deadline)) is not None:
            reply = json.loads(line)
            # One that died after its answer has two replies; the second belongs to no task.
            if reply["task"] == self._task:
                return Verdict(reply["status"], reply["reason"], reply["answer"])
        return None

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


class AnswerChecker:
    """Checks answers in worker processes; a comparison that reaches the time limit is killed.

    Args:
        timeout: seconds of CPU time one comparison may take (four times as many on the clock).
        workers: how many processes; they start with the first answer that needs math-verify.

    Checking raises UserError where such a process can't be started at all.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 2) -> None:
        self.timeout = timeout
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="verify")
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(workers):
            self._idle.put(None)
        self._workers = workers
        self._busy: set[_Worker] = set()
        self._stopped = False
        self.replaced = 0

    def submit(self, text: str, gold: str, *, free_form: bool = True) -> Future[Verdict]:
        """Start to check a completion against the gold answer.

        With `free_form`, a completion without an explicit answer is searched by math-verify (its last number or
        formula); without, it is wrong.
        """
        answer = extract_answer(text)
        verdict = quick_verdict(answer, gold) if answer is not None else None
        if answer is None and not free_form:
            verdict = Verdict("wrong", "no answer found")
        if verdict is not None:
            done: Future[Verdict] = Future()
            done.set_result(verdict)
            return done
        return self._threads.submit(self._verify, answer, text, gold)

    def check(self, text: str, gold: str, *, free_form: bool = True) -> Verdict:
        """As `submit`, and wait for the verdict."""
        return self.submit(text, gold, free_form=free_form).result(timeout=RESULT_LIMIT)

    def _verify(self, answer: str | None, text: str, gold: str) -> Verdict:
        number = plain_number(gold)
        if number is not None and number.denominator == 1:
            gold = str(number.numerator)
        prediction = text.rpartition("</think>")[2][-_TAIL:] if answer is None else answer
        verdict = self._ask(prediction, gold, answer is None)
        if verdict.reason.startswith(DIED) and not self._stopped:
            # Something else may have ended it (the machine short of memory, a user); if not, it will die again.
            verdict = self._ask(prediction, gold, answer is None)
        if verdict.reason == _NOT_STARTED and not self._stopped:
            command = f"{sys.executable} -P {_WORKER} {_MEMORY_LIMIT}"
            raise UserError(f"Answers can't be checked: the verifying process doesn't start; `{command}` shows why.")
        return verdict if answer is None else Verdict(verdict.status, verdict.reason, answer)

    def _ask(self, prediction: str, gold: str, free_form: bool) -> Verdict:
        worker, verdict = self._idle.get(timeout=RESULT_LIMIT), None
        try:
            worker = worker or _Worker()
            self._busy.add(worker)
            verdict = worker.ask(prediction, gold, free_form, self.timeout)
        finally:
            # Whatever happens, the place of the process is given back: others, and `close`, wait for it.
            if worker is not None:
                self._busy.discard(worker)
                if verdict is None:
                    worker.close()
            self._idle.put(worker if verdict is not None else None)
        if verdict is None:
            self.replaced += 1
            return Verdict("undecided", f"{DIED} (no reply)" if worker.ready else _NOT_STARTED)
        return verdict

    def close(self, *, at_once: bool = False) -> None:
        """Stop the workers. Checks that have not begun are dropped; those under way are too with `at_once`."""
        self._stopped = True
        if at_once:
            for worker in list(self._busy):
                worker.process.kill()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for _ in range(self._workers):
            idle = self._idle.get(timeout=RESULT_LIMIT)
            if idle is not None:
                idle.close()

    def __enter__(self) -> AnswerChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None)


@lru_cache(maxsize=1)
def _shared() -> AnswerChecker:
    checker = AnswerChecker()
    atexit.register(checker.close)
    return checker


def check(prediction_text: str, gold: str) -> Verdict:
    """Whether a completion's answer is right, with workers that this process keeps."""
    return _shared().check(prediction_text, gold)
