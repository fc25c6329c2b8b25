"""The process that decides what needs math-verify; it is started by path and talks JSON lines.

It imports no more of this project than what compares. Comparing can take for ever, exhaust memory or the C stack
(sympy on hostile input), so the kernel itself ends it: a timer without a handler, whatever the interpreter is doing.
math-verify's own time limits are switched off; they raise inside the interpreter and can be swallowed there.

The process that is started loads everything and then only watches a fork of itself at work. When that dies it says over
which task, and forks again: milliseconds, where a new interpreter would take a second.
"""

from __future__ import annotations

import gc
import json
import logging
import mmap
import os
import resource
import signal
import struct
import sys
from itertools import pairwise
from typing import Any

from sft.answers.decide import Question, decide
from sft.utils.signals import on_parents_death

# A busy machine must not turn right answers into undecided ones: CPU time is what counts, the wall has this much slack.
WALL_SLACK = 10.0
DIED = "verifier died"
Answer = tuple[str, str, str | None]
"""(right | wrong | undecided, reason, extracted answer)"""
# A fork ends itself after so many tasks, or when it has once been so large (bytes): parsers keep what they have seen.
_MOST_TASKS, _LARGEST = 5000, 1 << 30
_RENEW = 3
_USUAL = r"""1/2; 0.5; x=5; (1, 2]; \{1, x^2\}; \frac{\sqrt{3}}{2}; \left( 3, \frac{\pi}{2} \right); p - q; 11,-5
3\sqrt{13}; [-2,7] \cup (8, \infty); x^3+3x-6; \begin{pmatrix} 1 & -2 \\ 0 & 3 \end{pmatrix}; 6 - 5i; \log_2 8; 2^{n-1}
\sin(2x) + e^{-x}; 3!; y = 2x + 3; x \ge -1; \binom{5}{2}; -\frac{1}{3}; \text{even}; \frac{a+b}{c-d}; 1 \pm \sqrt{19}
(3,-2,5); 120^\circ"""
_SHOWN = [text.strip() for text in _USUAL.replace("\n", ";").split(";")]


def _answer(task: dict[str, Any]) -> Answer:
    from sft.answers.symbolic import equal

    signal.setitimer(signal.ITIMER_PROF, task["limit"])
    signal.setitimer(signal.ITIMER_REAL, WALL_SLACK * task["limit"])
    try:
        return decide(Question(**task["question"]), equal)
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
        # Whoever has read the reply may kill this process at once: no task is under way then.
        self.task = 0
        # ASCII of a few kilobytes: less than a pipe takes at once.
        os.write(self._descriptor, json.dumps(reply).encode() + b"\n")


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
    """The next line of the input. What more is in the pipe is the same line, asked again: nothing is read too far."""
    data = b""
    while not data.endswith(b"\n"):
        chunk = os.read(0, 1 << 16)
        if not chunk:
            return None
        data += chunk
    return data.splitlines()[-1]


def _fork(replies: _Replies) -> int:
    """Start a fork that serves; returns its process id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        on_parents_death(signal.SIGKILL)
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
    from sft.answers.symbolic import equal

    for gold, other in pairwise(_SHOWN):
        equal(other, gold)
    # Units and dates are read by libraries that take longer to load than a comparison may.
    decide(Question("2 hours", "120 minutes", "number"), equal)
    decide(Question("5 March", "March 5", "words"), equal)
    equal.cache_clear()
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
        if code != _RENEW:
            timeout = code in (-signal.SIGPROF, -signal.SIGALRM)
            # Task 0: it had noted none, but may have taken one from the pipe in its last moment. It is asked again.
            replies.send("undecided", "timeout" if timeout else f"{DIED} (exit {code})", None)


if __name__ == "__main__":
    main(int(sys.argv[1]))
