"""The step `score`: what the student makes of each answer, beside the teacher (arXiv 2601.09088)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.data.steps.journal import Journal
from sft.data.steps.score.answers import Answer, AnswerReader
from sft.data.steps.score.divergence import compare, student_facts
from sft.data.steps.score.student_view import local_naturalness, local_windows, rank_surprisal
from sft.data.steps.score.teacher_tokens import TeacherVocabulary, place_tokens
from sft.data.steps.score.token_scores import Document, TokenScorer, free_memory, in_batches, load_frozen
from sft.recipe.steps.score import LocalNaturalness, ScoreStep
from sft.utils.errors import UserError
from sft.utils.files import sha256_json

_VIEWS = ("rank_surprisal", "local_naturalness")


class Score(RowStep):
    """Notes the student's log probabilities, and how the answer's sentences divide between teacher and student.

    Facts: those of `sft.data.steps.score.divergence`; where nothing can be compared, the student's and `no_comparison`.
    Where asked for, those of `sft.data.steps.score.student_view`, for which no teacher is needed.
    Reasons: no_conversation, answer_not_rendered, too_long and what the chat template refuses; where a comparison is
    required also no_teacher_logprobs, tokens_do_not_match (the teacher's tokens don't spell the answer), bad_logprobs.

    One process scores; on a GPU where there is one, else on the CPU in float32. What was scored is in a journal that
    all runs share, so that a killed step goes on within its shard; batches are cut as if nothing had been scored, so
    the results are the same.
    """

    uses_tokenizer = True
    config: ScoreStep
    only_judges = True

    @classmethod
    def identity(cls, config: ScoreStep) -> dict[str, Any]:
        """Hashes of the student's weights (the commit of a Hub id) and of the teacher's tokenizer."""
        from sft.data.tokenize.tokens import check_tokenizer, tokenizer_hash
        from sft.models.identity import checkpoint_identity
        from sft.tokenizers.load import load_tokenizer

        found: dict[str, Any] = {"model": checkpoint_identity(config.model, config.revision)}
        if config.teacher_tokenizer is not None:
            tokenizer = load_tokenizer(config.teacher_tokenizer)
            check_tokenizer(tokenizer)
            found["teacher_tokenizer"] = tokenizer_hash(tokenizer, "")
        return found

    @classmethod
    def settings(cls, config: ScoreStep) -> dict[str, Any]:
        """All but where the student and the tokenizer lie: their content is what decides."""
        settings = config.model_dump(mode="json", exclude={"model", "teacher_tokenizer"})
        # What isn't asked for is no setting: scores that were found before there was such a thing are the same.
        return {key: value for key, value in settings.items() if value is not None or key not in _VIEWS}

    @classmethod
    def parallel(cls, config: ScoreStep) -> bool:
        """One forward pass fills the machine."""
        return False

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Rows in, rows out in order; one packed forward pass at a time."""
        rows = (self._refused(row) for row in self._reader.read(batch))
        for group in in_batches(rows, _length, self.config.batch_tokens):
            facts = iter(self._facts([row for row in group if isinstance(row, Answer)]))
            for row in group:
                yield row if isinstance(row, Dropped) else self._outcome(row, next(facts))

    def close(self) -> None:
        """Give the memory and the journal back."""
        if self.__dict__.pop("_scorer", None) is not None:
            free_memory()
        journal = self.__dict__.pop("_journal", None)
        if journal is not None:
            journal.close()

    def _refused(self, row: Answer | Dropped) -> Answer | Dropped:
        """The row, dropped where there is no need to score it."""
        if isinstance(row, Dropped):
            return row
        tokens = len(row.document.ids)
        if self.config.max_tokens is not None and tokens > self.config.max_tokens:
            return Dropped(row.record, "too_long", f"{tokens} tokens")
        if self.config.required and row.teacher is None:
            return Dropped(row.record, *row.no_comparison)
        return row

    def _facts(self, answers: list[Answer]) -> list[dict[str, Any]]:
        """Facts of each answer: from the journal, or by scoring those that it doesn't know."""
        keys = [self._key(answer) for answer in answers]
        known = self._journal.get(keys)
        missing = {key: answer for key, answer in zip(keys, answers, strict=True) if key not in known}
        if missing:
            new = dict(zip(missing, self._scored(list(missing.values())), strict=True))
            self._journal.add(new)
            known |= new
        return [known[key] for key in keys]

    def _scored(self, answers: list[Answer]) -> list[dict[str, Any]]:
        scores = self._scorer([answer.document for answer in answers])
        found = [self._found(answer, own.astype(np.float64)) for answer, own in zip(answers, scores, strict=True)]
        if (local := self.config.local_naturalness) is None:
            return found
        windows = [_windows(answer, local) for answer in answers]
        parts = iter(self._scorer([window for own in windows for window in own]))
        for facts, own in zip(found, windows, strict=True):
            facts |= local_naturalness([_columns(next(parts))[0].astype(np.float64) for _ in own])
        return found

    def _found(self, answer: Answer, scores: NDArray[np.float64]) -> dict[str, Any]:
        logprobs, ranks = _columns(scores)
        student = place_tokens(answer.spans, logprobs, answer.text)
        facts = {**student_facts(student), **({} if ranks is None else rank_surprisal(logprobs, ranks))}
        if answer.teacher is None:
            return {**facts, "no_comparison": ": ".join(answer.no_comparison)}
        config = self.config
        compared = compare(
            answer.text, student, *answer.teacher, margin=config.margin, keep_sentences=config.keep_sentences
        )
        return {**facts, **(compared or {"no_comparison": "tokens_do_not_match: no sentence has tokens of both"})}

    def _outcome(self, answer: Answer, facts: dict[str, Any]) -> Outcome:
        if self.config.required and "no_comparison" in facts:
            reason, _, detail = facts["no_comparison"].partition(": ")
            return Dropped(answer.record, reason, detail)
        answer.record.facts["score"] = facts
        return Kept(answer.record)

    def _key(self, answer: Answer) -> str:
        """Hash of all that an answer's facts depend on, the weights among them."""
        teacher = answer.teacher[0] if answer.teacher is not None else None
        parts: list[NDArray[Any]] = [answer.document.ids, answer.document.scored, answer.spans]
        parts += [teacher.starts, teacher.ends, teacher.logprobs] if teacher is not None else []
        digest = hashlib.blake2b(self._settings_hash.encode(), digest_size=16)
        for part in parts:
            digest.update(f"{part.dtype}{part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        digest.update(answer.no_comparison[0].encode())
        return digest.hexdigest()

    @cached_property
    def _settings_hash(self) -> str:
        return sha256_json({"version": self.version, **self.settings(self.config), **self.identity(self.config)})

    @cached_property
    def _journal(self) -> Journal:
        return Journal(self.context.journal / f"scores-{self._settings_hash[:32]}.sqlite")

    @cached_property
    def _reader(self) -> AnswerReader:
        from sft.tokenizers.load import load_tokenizer

        tokenizer = self.context.tokenizer
        path = self.config.teacher_tokenizer
        teacher = TeacherVocabulary(tokenizer if path is None else load_tokenizer(path))
        return AnswerReader(tokenizer, teacher, self.context.templates)

    @cached_property
    def _scorer(self) -> Any:
        """The student, loaded when the first row needs it."""
        self._check_tokenizer()
        model = load_frozen(self.config.model, self.config.dtype, self.config.revision)
        ranks = self.config.rank_surprisal
        return TokenScorer(model, self.config.batch_tokens, ranks.max_rank if ranks is not None else None)

    def _check_tokenizer(self) -> None:
        """Refuse a student that has another vocabulary beside it than the tokenizer that is trained with."""
        from sft.tokenizers.load import load_tokenizer

        try:
            own = load_tokenizer(self.config.model, revision=self.config.revision)
        except UserError:
            return  # a checkpoint without a tokenizer: any may be its own, as far as its ids go
        if own.get_vocab() != self.context.tokenizer.get_vocab():
            raise UserError(
                f"score: {self.config.model} has another vocabulary than the tokenizer of this recipe "
                f"({self.context.tokenizer_path}), so its probabilities would be of other words: score with the model "
                "that the recipe trains."
            )


def _length(row: Answer | Dropped) -> int:
    return len(row.document.ids) if isinstance(row, Answer) else 0


def _columns(scores: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any] | None]:
    """(log probabilities, ranks where there are some) of one document."""
    return (scores, None) if scores.ndim == 1 else (scores[:, 0], scores[:, 1])


def _windows(answer: Answer, settings: LocalNaturalness) -> list[Document]:
    starts = place_tokens(answer.spans, np.zeros(len(answer.spans)), answer.text).starts
    ids = answer.document.ids[answer.document.scored]
    return local_windows(answer.text, ids, starts, settings.context, settings.every)
