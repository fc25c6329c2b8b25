"""The step `top_logprobs`: what a teacher found likeliest at each token of an answer, to learn from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, TeacherTokens
from sft.data.steps.base import RowStep
from sft.data.steps.score.teacher_tokens import TeacherVocabulary
from sft.data.steps.top_logprobs.given import BadTopError, NoTokenError, from_content, from_ids
from sft.data.steps.top_logprobs.vocabulary import OwnVocabulary
from sft.recipe.steps.top_logprobs import OF_MODEL, TopLogprobsStep

if TYPE_CHECKING:
    from sft.data.steps.top_logprobs.teacher import Teacher


class TopLogprobs(RowStep):
    """Sets `teacher_top`; the column goes. Whether the tokens are those of the text shows when it is tokenised.

    Reasons: no_top_logprobs, bad_top_logprobs (not numbers, not finite, above 0, of more than 1 together, a token named
    twice), tokens_do_not_match (a token of the answer is none of ours); of a teacher in this process too_long, and what
    can't be rendered. Facts: tokens, k.

    No journal keeps what a teacher in this process says: that would be most of a kilobyte for each token. A killed step
    goes on at its shard.
    """

    config: TopLogprobsStep
    uses_tokenizer = True
    changes_text = True  # the tokens of a text that was tokenised before lack what its teacher says

    @classmethod
    def identity(cls, config: TopLogprobsStep) -> dict[str, Any]:
        """The teacher by its weights (of a Hub id the commit), or its tokenizer by its content."""
        if config.model is not None:
            from sft.models.identity import checkpoint_identity

            return {"model": checkpoint_identity(config.model, config.revision)}
        if config.tokenizer is None:
            return {}
        from sft.data.tokenize.tokens import check_tokenizer, tokenizer_hash

        tokenizer = _load(config.tokenizer)
        check_tokenizer(tokenizer)
        return {"tokenizer": tokenizer_hash(tokenizer, "")}

    @classmethod
    def settings(cls, config: TopLogprobsStep) -> dict[str, Any]:
        """All but where teacher and tokenizer lie; those of a teacher in this process where there is one."""
        unused = set() if config.model is not None else set(OF_MODEL)
        return config.model_dump(mode="json", exclude={"tokenizer", "model", *unused})

    @classmethod
    def parallel(cls, config: TopLogprobsStep) -> bool:
        """A teacher's forward pass fills the machine."""
        return config.model is None

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Raises UserError for a tokenizer or teacher of another vocabulary."""
        if self.config.model is None:
            yield from map(self._outcome, batch)
            return
        for record, said in zip(batch, self._model(batch), strict=True):
            yield self._kept(record, said) if isinstance(said, TeacherTokens) else said

    def close(self) -> None:
        """Give the teacher's memory back."""
        if "_model" in self.__dict__:
            self._model.close()

    def _outcome(self, record: Record) -> Outcome:
        value = self._value(record)
        if record.completion is None or value is None:
            return self._absent(record)
        try:
            said = self._read(value)
        except BadTopError as error:
            return Dropped(record, "bad_top_logprobs", str(error))
        except NoTokenError as error:
            return Dropped(record, "tokens_do_not_match", str(error))
        return self._kept(record, said)

    def _absent(self, record: Record) -> Outcome:
        if self.config.missing == "keep":
            return Kept(record)
        return Dropped(record, "no_top_logprobs", "the row has no answer, or nothing that its teacher says of it")

    @staticmethod
    def _kept(record: Record, said: TeacherTokens) -> Kept:
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
    def _model(self) -> Teacher:
        from sft.data.steps.top_logprobs.teacher import Teacher  # torch, which the other ways can do without

        return Teacher(self.config, self.context.tokenizer, self._absent)

    @cached_property
    def _teacher(self) -> tuple[TeacherVocabulary, Any]:
        name = self.config.tokenizer
        tokenizer = self.context.tokenizer if name is None else _load(name)
        return TeacherVocabulary(tokenizer), self._own.table(tokenizer, name or "the tokenizer that is trained with")


def _load(name: str) -> Any:
    from sft.tokenizers.load import load_tokenizer

    return load_tokenizer(name)
