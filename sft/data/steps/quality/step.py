"""The step `quality`: traces that would teach bad habits go."""

from __future__ import annotations

from collections.abc import Iterator

from sft.answers.extract import last_boxed
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.data.steps.quality.repetition import looping_end, repeated_share
from sft.data.steps.quality.scripts import foreign_letters, native_scripts
from sft.data.steps.quality.truncation import cut_off, in_the_middle
from sft.data.text.thinking import Broken, Thought, find_thinking
from sft.recipe.steps.quality import QualityStep

Verdict = tuple[str, str]
"""(reason, detail) of what is wrong."""


class Quality(RowStep):
    """Drops a row for the first thing that is wrong with it, in this order.

    Reasons: no_conversation, too_short, loop (thinking or an answer ends in copies of one passage), think_not_closed,
    broken_think (marks closed twice, not at the beginning, ...), no_think, truncated (by the source's own word, or an
    open formula box or code fence), no_answer, repetition, language_mix. What is asked of the thinking, of the answer
    and of the length goes for the last answer; the rest for every message of the assistant, since all are learned.
    facts["quality"] of a kept row: `repetition` and `foreign`, the largest shares of any message.
    """

    config: QualityStep
    only_judges = True

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """One outcome a record."""
        for record in batch:
            verdict = self._judge(record)
            yield Dropped(record, *verdict) if verdict is not None else Kept(record)

    def _judge(self, record: Record) -> Verdict | None:
        if record.messages is None:
            return "no_conversation", "a problem without an answer has no quality"
        answers = [message["content"] for message in record.messages if message["role"] == "assistant"]
        if not answers:
            return "no_answer", "no assistant message"
        if len(answers[-1].strip()) < self.config.min_characters:
            return "too_short", f"{len(answers[-1].strip())} characters"
        found = [find_thinking(answer) for answer in answers]
        parts = [_parts(answer, thought) for answer, thought in zip(answers, found, strict=True)]
        verdict = self._loop([part for of_answer in parts for part in of_answer])
        verdict = verdict or _marks(answers, found) or self._last(record, answers[-1], found[-1])
        return verdict or self._shares(record, parts)

    def _loop(self, parts: list[str]) -> Verdict | None:
        for part in parts:
            loop = looping_end(part, self.config.max_loop)
            if loop is not None:
                return "loop", f"ends in {loop.copies} copies of {loop.passage[:80]!r}"
        return None

    def _last(self, record: Record, content: str, thought: Thought | Broken | None) -> Verdict | None:
        """What is wrong with the last answer's thinking, its end, and what follows the thinking."""
        if self.config.think == "required":
            if not isinstance(thought, Thought):
                return "no_think", "no thinking"
            if thought.marks != "think" or not thought.opened:
                marks = thought.marks if thought.marks != "think" else "no opening mark"
                return "no_think", f"no <think> block ({marks}): put `render` with `think: normalize` before"
            if not thought.text.strip():
                return "no_think", "the <think> block is empty"
        if self.config.finish_reason is not None:
            said = record.carried.get(self.config.finish_reason)
            if said is not None and said not in self.config.finished:
                return "truncated", f"{self.config.finish_reason} is {said!r:.80}"
        answer = thought.answer if isinstance(thought, Thought) else content
        sign = cut_off(answer)
        if sign is not None:
            return "truncated", sign
        if self.config.answer != "none" and not answer.strip():
            return "no_answer", "nothing follows the thinking"
        if self.config.answer == "boxed" and last_boxed(answer) is None:
            return "no_answer", "no boxed answer after the thinking"
        return None

    def _shares(self, record: Record, parts: list[list[str]]) -> Verdict | None:
        assert record.messages is not None
        repetition = max(repeated_share(of_answer, self.config.ngram) for of_answer in parts)
        if repetition > self.config.max_repetition:
            return "repetition", f"{repetition:.1%} of the words stood there before, {self.config.ngram} in a row"
        question = "\n".join(message["content"] for message in record.messages if message["role"] == "user")
        native = native_scripts(question)
        foreign = max((foreign_letters("\n".join(of), native) for of in parts), key=lambda found: found.share)
        if foreign.share > self.config.max_foreign:
            return "language_mix", f"{foreign.letters} of {foreign.total} letters are {foreign.script.lower()}"
        record.facts["quality"] = {"repetition": round(repetition, 4), "foreign": round(foreign.share, 4)}
        return None


def _parts(answer: str, thought: Thought | Broken | None) -> list[str]:
    """Thinking and answer apart: an answer may well repeat what was thought."""
    return [thought.text, thought.answer] if isinstance(thought, Thought) else [answer]


def _marks(answers: list[str], found: list[Thought | Broken | None]) -> Verdict | None:
    for answer, thought in zip(answers, found, strict=True):
        if isinstance(thought, Broken) and not thought.closed:
            end = "; the text stops in the middle of a sentence" if in_the_middle(answer) else ""
            return "think_not_closed", thought.detail + end
        if isinstance(thought, Broken):
            return "broken_think", thought.detail
    return None
