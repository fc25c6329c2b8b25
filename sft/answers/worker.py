"""The process that compares two answers with math-verify; it is started by path and talks JSON lines.

It imports nothing of this package, so that it starts fast. Comparing can take for ever, exhaust memory or the C stack
(sympy on hostile input), so the kernel itself ends it: a timer without a handler, whatever the interpreter is doing.
math-verify's own time limits are switched off; they raise inside the interpreter and can be swallowed there.

The process that is started loads everything and then only watches a fork of itself at work. When that dies it says over
which task, and forks again: milliseconds, where a new interpreter would take a second.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import mmap
import os
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

# A busy machine must not turn right answers into undecided ones: CPU time is what counts, the wall has this much slack.
WALL_SLACK = 4.0
DIED = "verifier died"
_LONGEST_ANSWER = 500
# A fork ends itself after so many tasks, or when it has once been so large (bytes): parsers keep what they have seen.
_MOST_TASKS, _LARGEST = 5000, 1 << 30
_RENEW = 3
_PR_SET_PDEATHSIG = 1
_USUAL = (
    *("1/2", "0.5", "x=5", "(1, 2]", r"\{1, x^2\}", r"\frac{\sqrt{3}}{2}", r"\left( 3, \frac{\pi}{2} \right)", "p - q"),
    *(
        r"3\sqrt{13}",
        r"[-2,7] \cup (8, \infty)",
        r"x^3+3x-6",
        "11,-5",
        r"\begin{pmatrix} 1 & -2 \\ 0 & 3 \end{pmatrix}",
    ),
    *(r"6 - 5i", r"\log_2 8", r"\sin(2x) + e^{-x}", r"2^{n-1} \cdot 3!", r"y = 2x + 3", r"x \ge -1", r"\binom{5}{2}"),
    *(r"\pm 19", r"-\frac{1}{3}", r"\text{even}", r"\frac{a+b}{c-d}", r"1 \pm \sqrt{19}", r"(3,-2,5)", r"120^\circ"),
)


# Rollouts of one problem have one gold answer and few different answers.
@lru_cache(maxsize=1024)
def judge(prediction: str, gold: str, free_form: bool) -> tuple[str, str, str | None]:
    """(right | wrong | undecided, reason, extracted answer) for a prediction.

    `prediction` is an answer alone, or with `free_form` a text in which math-verify looks for the answer.
    """
    from math_verify import parse

    wanted = _parse_answer(parse, gold)
    if not wanted:
        return "undecided", "the gold answer can't be read", None
    given = parse(prediction, parsing_timeout=None) if free_form else _parse_answer(parse, prediction)
    if not given:
        return "wrong", "no answer found" if free_form else "the answer can't be read", None
    extracted = next((part for part in given if isinstance(part, str)), None) if free_form else None
    status, reason = _compare(wanted, given)
    return status, reason, extracted[:_LONGEST_ANSWER] if extracted else None


def _parse_answer(parse: Any, answer: str) -> list[Any]:
    """Read an answer that stands alone. Boxing it makes math-verify take all of it, not the last number in it."""
    return parse(f"\\boxed{{{answer}}}", parsing_timeout=None) or parse(answer, parsing_timeout=None)


def _compare(wanted: Iterable[Any], given: Iterable[Any]) -> tuple[str, str]:
    """Right if any reading of one equals any reading of the other; undecided if no pair could be compared."""
    from math_verify import verify

    compared, failure = 0, ""
    for gold in wanted:
        for answer in given:
            try:
                if verify(gold, answer, timeout_seconds=None, raise_on_error=True):
                    return "right", "math-verify"
                compared += isinstance(gold, str) == isinstance(answer, str)
            except MemoryError:
                raise
            except Exception as error:
                failure = type(error).__name__
    if failure and not compared:
        return "undecided", f"comparison failed: {failure}"
    return "wrong", "math-verify"


def _answer(task: dict[str, Any]) -> tuple[str, str, str | None]:
    from sympy.core import random

    # sympy tests equality with random numbers, too: the same ones for a task, whatever came before it.
    random.seed(0)
    signal.setitimer(signal.ITIMER_PROF, task["limit"])
    signal.setitimer(signal.ITIMER_REAL, WALL_SLACK * task["limit"])
    try:
        return judge(task["prediction"], task["gold"], task["free_form"])
    except MemoryError:
        return "undecided", "out of memory", None
    except Exception as error:
        return "undecided", f"comparison failed: {type(error).__name__}", None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


class _Replies:
    """Writes replies; `task` is the number of the one under way (0: none) and seen by both sides of a fork."""

    def __init__(self) -> None:
        self._descriptor = os.dup(1)
        # Parsers print complaints; they must not get between the replies.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        self._shared = mmap.mmap(-1, 8)

    @property
    def task(self) -> int:
        number: int = struct.unpack("q", self._shared[:8])[0]
        return number

    @task.setter
    def task(self, number: int) -> None:
        self._shared[:8] = struct.pack("q", number)

    def ready(self) -> None:
        os.write(self._descriptor, b"ready\n")

    def send(self, status: str, reason: str, answer: str | None) -> None:
        """Reply to the task under way."""
        reply = {"task": self.task, "status": status, "reason": reason, "answer": answer}
        # ASCII of a few kilobytes: less than a pipe takes at once.
        os.write(self._descriptor, json.dumps(reply).encode() + b"\n")
        self.task = 0


def _serve(replies: _Replies) -> int:
    """Work on tasks until the input closes (returns 0) or a fresh fork should go on (_RENEW)."""
    for _ in range(_MOST_TASKS):
        line = _read_line()
        if line is None:
            return 0
        task = json.loads(line)
        replies.task = task["task"]
        status, reason, answer = _answer(task)
        replies.send(status, reason, answer)
        if reason == "out of memory" or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > _LARGEST:
            break
    return _RENEW


def _read_line() -> bytes | None:
    """The next line of the input. There is never more than one in the pipe, so nothing is read too far."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return None
        data += chunk
    return data


def _fork(replies: _Replies) -> int:
    """Start a fork that serves; returns its process id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:
            code = _serve(replies)
    finally:
        os._exit(code)


def _prepare(memory_limit: int) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    # Imports what comparing needs, and shows the parser what answers look like: all forks know it then.
    for gold, other in zip(_USUAL, [*_USUAL[1:], _USUAL[0]], strict=True):
        judge(other, gold, False)
    judge.cache_clear()
    gc.freeze()


def main(memory_limit: int) -> None:
    """Serve tasks from standard input until it closes. `memory_limit` is in bytes."""
    replies = _Replies()
    _prepare(memory_limit)
    replies.ready()
    while True:
        _, status = os.waitpid(_fork(replies), 0)  # bounded: the fork ends with the input, which ends with the run
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            return
        if replies.task:
            timeout = code in (-signal.SIGPROF, -signal.SIGALRM)
            replies.send("undecided", "timeout" if timeout else f"{DIED} (exit {code})", None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
