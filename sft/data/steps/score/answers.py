"""From a row to what is scored of it: the conversation's tokens, and where those of its last answer stand in it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.read.outcomes import Dropped
from sft.data.read.record import Record
from sft.data.read.row import BadRow
from sft.data.steps.score.teacher_tokens import NoMatchError, TeacherVocabulary, TextTokens
from sft.data.steps.score.token_scores import Document, in_batches
from sft.data.tokenize.render import Rendered, Renderer
from sft.recipe.schema import Templates

READ_AT_ONCE = 16  # conversations in the tokenizer's form, which takes a hundred bytes a token


@dataclass(frozen=True, slots=True)
class Answer:
    """The last answer of a row.

    Attributes:
        text: the answer.
        document: the conversation's tokens; scored are those of the answer.
        spans: (number scored, 2), the characters of `text` that each takes.
        teacher: the teacher's tokens in it, with the characters that they cover; None where they can't be compared.
        no_comparison: (reason, detail) why there is no `teacher`.
    """

    record: Record
    text: str
    document: Document
    spans: NDArray[np.int64]
    teacher: tuple[TextTokens, NDArray[np.bool_]] | None
    no_comparison: tuple[str, str] = ("", "")


class AnswerReader:
    """Reads rows with the tokenizer that is trained with."""

    def __init__(self, tokenizer: Any, teacher: TeacherVocabulary, templates: Templates) -> None:
        self._tokenizer, self._teacher = tokenizer, teacher
        self._renderer = Renderer(tokenizer)
        before, _, after = (templates.completion_template or "{completion}").partition("{completion}")
        self._around = before, after

    def read(self, records: Iterable[Record]) -> Iterator[Answer | Dropped]:
        """One for each record, in order; dropped are rows without an answer, and those that can't be rendered."""
        for part in in_batches(records, lambda _: 1, READ_AT_ONCE):
            rendered = [self._rendered(record) for record in part]
            texts = [item.text for item in rendered if isinstance(item, Rendered)]
            encoded = iter(self._encoded(texts))
            for record, item in zip(part, rendered, strict=True):
                yield item if isinstance(item, Dropped) else self._answer(record, item, *next(encoded))

    def _rendered(self, record: Record) -> Rendered | Dropped:
        if record.messages is None or record.completion is None:
            return Dropped(record, "no_conversation", "a problem without an answer has no probability")
        rendered = self._renderer.render(record.messages, (), record.tools, record.chat_template_kwargs)
        return Dropped(record, rendered.reason, rendered.detail) if isinstance(rendered, BadRow) else rendered

    def _encoded(self, texts: list[str]) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
        """(ids, characters) of each text."""
        if not texts:
            return []
        encoded = self._tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [
            (np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2))
            for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        ]

    def _answer(
        self, record: Record, rendered: Rendered, ids: NDArray[np.int32], offsets: NDArray[np.int64]
    ) -> Answer | Dropped:
        text = self._own_words(record.completion or "")
        begin, end = rendered.spans[-1]
        place = rendered.text.find(text, begin, end)
        if place < 0:
            text = text.strip()  # as some templates put it
            place = rendered.text.find(text, begin, end)
        if place < 0 or not text:
            return Dropped(record, "answer_not_rendered", "the chat template doesn't say the answer as it is")
        scored = (offsets[:, 0] >= place) & (offsets[:, 0] < place + len(text))
        scored[:1] = False
        if not scored.any():
            return Dropped(record, "answer_not_rendered", "no token begins inside the answer")
        spans = (offsets[scored] - place).clip(0, len(text))
        try:
            teacher, reason = self._aligned(record, text), ("", "")
        except _NoComparisonError as error:
            teacher, reason = None, error.reason
        return Answer(record, text, Document(ids, scored), spans, teacher, reason)

    def _own_words(self, completion: str) -> str:
        """The completion without what `completion_template` put around it."""
        before, after = self._around
        if completion.startswith(before) and completion.endswith(after) and len(completion) > len(before) + len(after):
            return completion[len(before) : len(completion) - len(after)]
        return completion

    def _aligned(self, record: Record, text: str) -> tuple[TextTokens, NDArray[np.bool_]]:
        ids, logprobs = record.teacher_ids, record.teacher_logprobs
        if not ids or logprobs is None:
            raise _NoComparisonError("no_teacher_logprobs", "the row has no log probabilities of its teacher")
        if len(ids) != len(logprobs):
            raise _NoComparisonError("tokens_do_not_match", f"{len(ids)} ids, {len(logprobs)} log probabilities")
        bad = next((value for value in logprobs if math.isnan(value) or value > 1e-3), None)
        if bad is not None:
            raise _NoComparisonError("bad_logprobs", f"{bad} is no log probability")
        try:
            return self._teacher.align(ids, logprobs, text)
        except NoMatchError as error:
            raise _NoComparisonError("tokens_do_not_match", str(error)) from error


class _NoComparisonError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        self.reason = (reason, detail)
