"""A teacher in this process: it reads conversations in our tokens, and says what it finds likeliest in the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sft.data.read.outcomes import Dropped, Outcome
from sft.data.read.record import Record, TeacherTokens
from sft.data.read.row import BadRow
from sft.data.steps.score.token_scores import Document, free_memory, in_batches, load_frozen
from sft.data.steps.top_logprobs.likeliest import LikeliestTokens
from sft.data.steps.top_logprobs.vocabulary import check_same_ids
from sft.data.tokenize.render import Rendered, Renderer
from sft.data.tokenize.tokens import Owned, tokenize_owned
from sft.models.positions import learned_positions
from sft.recipe.steps.top_logprobs import TopLogprobsStep
from sft.tokenizers.load import load_tokenizer
from sft.utils.errors import UserError

READ_AT_ONCE = 16  # conversations that are rendered and tokenised together


@dataclass(frozen=True, slots=True)
class _Answer:
    """A row with its conversation's tokens, of which those of the last answer are scored."""

    record: Record
    document: Document


class Teacher:
    """Asks a checkpoint, which is loaded when the first row needs it.

    On a GPU where there is one, else on the CPU. A document is read alone or packed with others that it never sees.
    """

    def __init__(self, config: TopLogprobsStep, tokenizer: Any, absent: Callable[[Record], Outcome]) -> None:
        """`tokenizer`: the one that is trained with. `absent`: what becomes of a row without an answer."""
        self._config, self._tokenizer, self._absent = config, tokenizer, absent
        self._renderer = Renderer(tokenizer)

    def __call__(self, records: Iterable[Record]) -> Iterator[TeacherTokens | Outcome]:
        """For each record, in order, what the teacher says, or what becomes of the row without.

        Raises UserError for a teacher of another vocabulary, or one that can't be loaded or scored with.
        """
        for rows in in_batches(self._read(records), _length, self._config.batch_tokens):
            answers = [row.document for row in rows if isinstance(row, _Answer)]
            tops = iter(self._likeliest.top(answers) if answers else [])
            for row in rows:
                if isinstance(row, _Answer):
                    yield TeacherTokens(row.document.ids[row.document.scored], next(tops))
                else:
                    yield row

    def close(self) -> None:
        """Give the memory back."""
        if self.__dict__.pop("_likeliest", None) is not None:
            free_memory()

    def _read(self, records: Iterable[Record]) -> Iterator[_Answer | Outcome]:
        for part in in_batches(records, lambda _: 1, READ_AT_ONCE):
            rendered = [self._rendered(record) for record in part]
            texts = [item for item in rendered if isinstance(item, Rendered)]
            tokens = tokenize_owned(self._tokenizer, texts)
            for record, item in zip(part, rendered, strict=True):
                yield self._answer(record, next(tokens)) if isinstance(item, Rendered) else item

    def _rendered(self, record: Record) -> Rendered | Outcome:
        if record.messages is None or record.completion is None:
            return self._absent(record)
        # As it is tokenised later, but that all answers are marked: where the last one isn't trained nothing is lost.
        found = self._renderer.render(record.messages, (), record.tools, record.chat_template_kwargs)
        return Dropped(record, found.reason, found.detail) if isinstance(found, BadRow) else found

    def _answer(self, record: Record, owned: Owned) -> _Answer | Outcome:
        ids, owners = owned.tokens.ids, owned.owners
        places = np.flatnonzero((owners >= 0) & (owners == owners.max(initial=-1)))
        if not len(places):
            return self._absent(record)
        # The last stretch: there `aligned` looks for the teacher's tokens.
        begin = places[np.flatnonzero(np.diff(places, prepend=-2) > 1)[-1]]
        scored = np.zeros(len(ids), bool)
        scored[max(int(begin), 1) : int(places[-1]) + 1] = True
        known = learned_positions(self._likeliest.model)
        if known is not None and len(ids) > known:
            return Dropped(record, "too_long", f"{len(ids)} tokens, and the teacher has learned {known} positions")
        return _Answer(record, Document(ids, scored))

    @cached_property
    def _likeliest(self) -> LikeliestTokens:
        config, name = self._config, str(self._config.model)
        check_same_ids(self._tokenizer, load_tokenizer(name, revision=config.revision), name)
        model = load_frozen(name, config.dtype, config.revision)
        rows = len(model.get_output_embeddings().weight)
        if config.k > rows:
            raise UserError(f"top_logprobs.k is {config.k}, and the vocabulary of {name} has {rows} tokens.")
        named = np.zeros(rows, bool)  # rows that only fill the head up are no tokens, nor are the teacher's own ones
        named[[number for number in self._tokenizer.get_vocab().values() if number < rows]] = True
        return LikeliestTokens(model, config.batch_tokens, min(config.k, int(named.sum())), named)


def _length(row: _Answer | Outcome) -> int:
    return len(row.document.ids) if isinstance(row, _Answer) else 0
