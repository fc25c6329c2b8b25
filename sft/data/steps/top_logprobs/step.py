"""The step `top_logprobs`: what a teacher found likeliest at each token of an answer, to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, TeacherTokens
from sft.data.steps.base import RowStep
from sft.data.steps.score.teacher_tokens import TeacherVocabulary
from sft.data.steps.top_logprobs.given import BadTopError, NoTokenError, from_content, from_ids
from sft.data.steps.top_logprobs.vocabulary import OwnVocabulary
from sft.recipe.steps.top_logprobs import TopLogprobsStep


class TopLogprobs(RowStep):
    """Sets `teacher_top`; the column goes. Whether the tokens are those of the text shows when it is tokenised.

    Reasons: no_top_logprobs, bad_top_logprobs (not numbers, not finite, above 0, of more than 1 together, a token named
    twice), tokens_do_not_match (a token of the answer is none of ours). Facts: tokens, k.
    """

    config: TopLogprobsStep
    uses_tokenizer = True
    changes_text = True  # the tokens of a text that was tokenised before lack what its teacher says

    @classmethod
    def identity(cls, config: TopLogprobsStep) -> dict[str, Any]:
        """The teacher's tokenizer by its content."""
        if config.tokenizer is None:
            return {}
        from sft.data.tokenize.tokens import check_tokenizer, tokenizer_hash

        tokenizer = _load(config.tokenizer)
        check_tokenizer(tokenizer)
        return {"tokenizer": tokenizer_hash(tokenizer, "")}

    @classmethod
    def settings(cls, config: TopLogprobsStep) -> dict[str, Any]:
        """All but where the tokenizer lies."""
        return config.model_dump(mode="json", exclude={"tokenizer"})

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Raises UserError for a tokenizer of another kind of vocabulary."""
        return map(self._outcome, batch)

    def _outcome(self, record: Record) -> Outcome:
        value = self._value(record)
        if record.completion is None or value is None:
            if self.config.missing == "keep":
                return Kept(record)
            return Dropped(record, "no_top_logprobs", "the row has no answer, or nothing that its teacher says of it")
        try:
            said = self._read(value)
        except BadTopError as error:
            return Dropped(record, "bad_top_logprobs", str(error))
        except NoTokenError as error:
            return Dropped(record, "tokens_do_not_match", str(error))
        record.teacher_top = said
        record.forget_tokens()
        record.facts["top_logprobs"] = {"tokens": len(said.tokens), "k": said.top.ids.shape[1]}
        return Kept(record)

    def _value(self, record: Record) -> Any:
        if self.config.column is not None:
            return record.carried.pop(self.config.column, None)
        if record.teacher_ids is None or record.teacher_logprobs is None:
            return None
        ids, logprobs = record.teacher_ids, record.teacher_logprobs
        return {"tokens": ids, "ids": [[number] for number in ids], "logprobs": [[value] for value in logprobs]}

    def _read(self, value: Any) -> TeacherTokens:
        if isinstance(value, Mapping) and "tokens" in value:
            teacher, table = self._teacher
            return from_ids(value, teacher, table)
        content = value.get("content") if isinstance(value, Mapping) else value
        if not isinstance(content, list):
            raise BadTopError("expected {tokens, ids, logprobs}, or `logprobs` as a chat answer has them")
        return from_content(content, self._own)

    @cached_property
    def _own(self) -> OwnVocabulary:
        return OwnVocabulary(self.context.tokenizer)

    @cached_property
    def _teacher(self) -> tuple[TeacherVocabulary, Any]:
        name = self.config.tokenizer
        tokenizer = self.context.tokenizer if name is None else _load(name)
        return TeacherVocabulary(tokenizer), self._own.table(tokenizer, name or "the tokenizer that is trained with")


def _load(name: str) -> Any:
    from sft.tokenizers.load import load_tokenizer

    return load_tokenizer(name)
