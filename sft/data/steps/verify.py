"""The step `verify`: rows whose final answer isn't the gold answer go."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from sft.answers.choices import LETTERS, listed_options, options_in
from sft.answers.extract import extract_answer
from sft.answers.judge import Judge, Verdict
from sft.answers.pool import RESULT_LIMIT
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.recipe.steps.verify import VerifyStep

if TYPE_CHECKING:
    from sft.data.steps.context import Context

# What is noted of an answer, and the longest gold answer without a mark: a longer text is a solution.
_SHOWN, _LONGEST_GOLD = 200, 500
_LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy", "pint", "python-dateutil")


@dataclass(frozen=True)
class _Check:
    """A comparison under way. Without a verdict to come there is nothing to compare with, and `gold` says why."""

    gold: str
    verdict: Future[Verdict] | None = None


class Verify(RowStep):
    """Drops rows by the verdict on their answer, and notes it.

    Facts: {verdict: right | wrong | undecided | no_gold, reason, kind: math | choice | exact | number | words,
    answer, gold}; with no_gold, `reason` says what is in its place, and nothing else is noted.
    """

    version = 2
    config: VerifyStep
    only_judges = True

    def __init__(self, config: VerifyStep, context: Context) -> None:
        super().__init__(config, context)
        # One: other processes work on the step, too, and this one waits while it compares.
        self._judge = Judge(config.timeout, workers=1)

    @classmethod
    def identity(cls, config: VerifyStep) -> dict[str, Any]:
        """The versions of what compares."""
        return {name: version(name) for name in _LIBRARIES}

    def close(self) -> None:
        """End the judging process; comparisons under way are given up."""
        self._judge.close(at_once=True)

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Reasons: wrong, undecided, right (where it isn't kept), no_gold, no_conversation (a problem, no answer)."""
        # All are asked before the first is waited for: the judging process compares while this one extracts.
        checks = [self._start(record) for record in batch]
        for record, check in zip(batch, checks, strict=True):
            yield self._outcome(record, check)

    def _start(self, record: Record) -> _Check | None:
        """Begin to check; None for a record without an answer."""
        text = record.completion
        if text is None:
            return None
        gold, missing = self._gold(record)
        if gold is None:
            return _Check(missing)
        options = self._options(record) if self.config.kind in ("auto", "choice") else None
        verdict = self._judge.submit(
            text, gold, options=options, kind=self.config.kind, free_form=self.config.free_form
        )
        return _Check(gold, verdict)

    def _gold(self, record: Record) -> tuple[str | None, str]:
        """(gold answer, why there is none)."""
        name = self.config.gold
        value = record.answer if name == "answer" and record.answer is not None else record.carried.get(name)
        if isinstance(value, (list, tuple)) and len(value) == 1:
            value = value[0]
        if value is None or isinstance(value, (list, tuple, dict)):
            return None, f"'{name}' is {'empty' if value is None else f'{type(value).__name__} of {len(value)}'}"
        if self.config.kind == "choice" and type(value) is int and 0 <= value < len(LETTERS):
            return LETTERS[value], ""
        text = str(value).strip()
        marked = extract_answer(text)
        if marked is None and self.config.kind != "exact" and len(text) > _LONGEST_GOLD:
            return None, f"no marked answer in the {len(text)} characters of '{name}'"
        return (marked or text or None), f"'{name}' is empty"

    def _options(self, record: Record) -> dict[str, str]:
        if self.config.choices is not None:
            return listed_options(record.carried.get(self.config.choices))
        return options_in(record.problem or "")

    def _outcome(self, record: Record, check: _Check | None) -> Outcome:
        if check is None:
            return Dropped(record, "no_conversation", "a problem without an answer can't be checked")
        if check.verdict is None:
            record.facts["verify"] = {"verdict": "no_gold", "reason": check.gold}
            return Kept(record) if self.config.missing_gold == "keep" else Dropped(record, "no_gold", check.gold)
        verdict = check.verdict.result(timeout=RESULT_LIMIT)
        answer, gold = _shown(verdict.answer), _shown(check.gold)
        record.facts["verify"] = {
            "verdict": verdict.status,
            "reason": verdict.reason,
            "kind": verdict.kind,
            "answer": answer,
            "gold": gold,
        }
        if verdict.status in self.config.keep:
            return Kept(record)
        return Dropped(record, verdict.status, f"answer {answer or 'not found'}, gold {gold}: {verdict.reason}")


def _shown(text: str | None) -> str | None:
    return text if text is None or len(text) <= _SHOWN else text[:_SHOWN] + "..."
