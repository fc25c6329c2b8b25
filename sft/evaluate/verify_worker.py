"""The process that compares two answers with math-verify; it is started by path and talks JSON lines.

It imports nothing of this package, so that it starts fast. Comparing can take for ever, exhaust memory or the C stack
(sympy on hostile input), so the kernel itself ends it: a timer without a handler, whatever the interpreter is doing.
math-verify's own time limits are switched off; they raise inside the interpreter and can be swallowed there.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Iterable
from typing import Any

# A busy machine must not turn right answers into undecided ones: CPU time is what counts, the wall has this much slack.
WALL_SLACK = 4.0
_LONGEST_ANSWER = 500


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


def main(memory_limit: int) -> None:
    """Serve tasks from standard input until it closes. `memory_limit` is in bytes."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Parsers print complaints; they must not get between the replies.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    resource.setrlimit(resource.RLIMIT_AS, (memory_limit, memory_limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    judge("1/2", "0.5", False)
    replies.write("ready\n")
    replies.flush()
    for line in sys.stdin:
        status, reason, answer = _answer(json.loads(line))
        replies.write(json.dumps({"status": status, "reason": reason, "answer": answer}) + "\n")
        replies.flush()
        if reason == "out of memory":
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
