"""The one judge: whether a completion's final answer is right. Evaluation and the step `verify` ask it alike."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Literal, NoReturn

from sft.answers.choices import options_in
from sft.answers.compare import Status
from sft.answers.decide import Kind, Question, decide, kind_of
from sft.answers.extract import extract_answer, near_boxes, stated, visible
from sft.answers.pool import RESULT_LIMIT, Pool

# How far from the end of a completion an answer without a mark is looked for.
_TAIL = 4000


@dataclass(frozen=True)
class Verdict:
    """What became of one answer: how it was decided, or why not; what was extracted; as what it was compared."""

    status: Status
    reason: str
    answer: str | None = None
    kind: Kind = "math"


class _NeedsMathError(Exception):
    """Only math-verify can tell, and it isn't called in this process."""


class Judge:
    """Judges completions. What needs math-verify is decided in worker processes, the rest at once.

    The verdict depends on nothing but what is asked: not on the process, nor on what was asked before.

    Args:
        timeout: seconds of CPU time one comparison may take (ten times as many on the clock) before it is killed.
        workers: how many processes; they start with the first answer that needs one.
    """

    def __init__(self, timeout: float = 5.0, workers: int = 2) -> None:
        self.pool = Pool(timeout, workers)

    def submit(
        self,
        text: str,
        gold: str,
        *,
        options: Mapping[str, str] | None = None,
        kind: Kind | Literal["auto"] = "auto",
        free_form: bool = True,
    ) -> Future[Verdict]:
        """The verdict on a completion, in the future. It raises UserError where no process can be started.

        Args:
            text: the completion, with its thinking.
            gold: the gold answer alone (`extract.gold_answer` finds it in a solution).
            options: the problem's choices, letter -> text.
            kind: how answers are compared; `auto` goes by the gold answer.
            free_form: whether an answer is looked for where none is marked. One that ends while thinking has none.
        """
        verdict: Future[Verdict] = Future()
        question = _question(text, gold, dict(options or {}), kind, free_form)
        try:
            status, reason, answer = decide(question, _elsewhere)
        except _NeedsMathError:
            asked = self.pool.submit({"question": asdict(question)})
            asked.add_done_callback(lambda done: _pass_on(done, verdict, question))
            return verdict
        verdict.set_result(Verdict(status, reason, answer, question.kind))  # type: ignore[arg-type]
        return verdict

    def judge(
        self,
        text: str,
        gold: str,
        *,
        options: Mapping[str, str] | None = None,
        kind: Kind | Literal["auto"] = "auto",
        free_form: bool = True,
    ) -> Verdict:
        """As `submit`, and wait for the verdict."""
        return self.submit(text, gold, options=options, kind=kind, free_form=free_form).result(timeout=RESULT_LIMIT)

    def close(self, *, at_once: bool = False) -> None:
        """Stop the processes. Checks that have not begun are dropped; those under way are too with `at_once`."""
        self.pool.close(at_once=at_once)

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=kind is not None)


def _question(text: str, gold: str, options: dict[str, str], kind: Kind | Literal["auto"], free_form: bool) -> Question:
    shown = visible(text).strip()
    answer = extract_answer(text)
    boxes = near_boxes(text) if answer is not None else []
    if answer is None and free_form:
        answer = stated(shown)
    # A completion that lists the choices by itself tells what its letter means.
    options = options or options_in(shown)
    free = shown[-_TAIL:] if free_form and answer is None and shown else None
    chosen: Kind = kind_of(gold, options) if kind == "auto" else kind
    return Question(answer, gold, chosen, tuple(boxes), free, kind != "auto", options)


def _elsewhere(mine: str, gold: str) -> NoReturn:
    raise _NeedsMathError


def _pass_on(done: Future[tuple[str, str, str | None]], verdict: Future[Verdict], question: Question) -> None:
    if done.cancelled():
        verdict.cancel()
    elif (error := done.exception(timeout=0)) is not None:
        verdict.set_exception(error)
    else:
        status, reason, answer = done.result(timeout=0)
        answer = question.answer if answer is None else answer
        verdict.set_result(Verdict(status, reason, answer, question.kind))  # type: ignore[arg-type]
