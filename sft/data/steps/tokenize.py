"""The step that no recipe names: conversations get their tokens, once for each text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sft.data.pack.tokens import TokensWriter
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, Tokens
from sft.data.read.row import BadRow
from sft.data.steps.base import RowStep

if TYPE_CHECKING:
    from sft.data.tokenize.tokens import Owned


@dataclass(frozen=True)
class TokenizeSettings:
    """`mask_history`: of a conversation the last answer alone is trained. `most`: see `tokenize`. `weights`: the column
    with the weights of each row's loss."""

    mask_history: bool = False
    most: int | None = None
    weights: str | None = None


LEAST = 1 << 15
"""Tokens up to which every text is read to its end: some seconds' work at most."""


def most_tokens(max_length: int | None) -> int | None:
    """How many tokens a text needn't be read beyond. Powers of two: most changes of the limit find the same tokens."""
    return None if max_length is None else max(LEAST, 1 << max_length.bit_length())


class Tokenize(RowStep):
    """Sets the tokens of every conversation as the chat template renders it, and writes them to `sink`.

    Dropped are conversations that can't be rendered: a message spells a control token out, the template refuses the
    roles or leaves out what a message says; those whose weights can't be used; and (tokens_do_not_match) those whose
    teacher's tokens aren't those of the text. The plan puts it where somebody needs the tokens of a text.
    """

    version = 2
    uses_tokenizer = True
    config: TokenizeSettings
    only_judges = True
    sink: TokensWriter

    @classmethod
    def settings(cls, config: TokenizeSettings) -> dict[str, Any]:
        """All of them; the weights' column where there is one."""
        return {key: value for key, value in asdict(config).items() if key != "weights" or value is not None}

    @cached_property
    def _renderer(self) -> Any:
        from sft.data.tokenize.render import Renderer
        from sft.data.tokenize.tokens import most_characters

        return Renderer(self.context.tokenizer, most_characters(self.context.tokenizer, self.config.most))

    def _render(self, record: Record) -> Any:
        untrained = self._untrained(record)
        return self._renderer.render(record.messages, untrained, record.tools, record.chat_template_kwargs)

    def _untrained(self, record: Record) -> set[int]:
        """Numbers of the assistant's messages that are context only."""
        return set(record.untrained) | (set(self._said(record)[:-1]) if self.config.mask_history else set())

    @staticmethod
    def _said(record: Record) -> list[int]:
        """Numbers of the assistant's messages."""
        return [number for number, message in enumerate(record.messages or ()) if message["role"] == "assistant"]

    def _weighted(self, record: Record, owned: Owned) -> Tokens | BadRow:
        """A document's tokens, with their weights where the stage's loss has any."""
        from sft.data.tokenize.weights import token_weights

        column = self.config.weights
        if column is None:
            return owned.tokens
        weights = token_weights(record.carried.get(column), record.messages or (), owned, column)
        return weights if isinstance(weights, BadRow) else replace(owned.tokens, weights=weights)

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        from sft.data.tokenize.tokens import tokenize_owned

        new = [record for record in batch if record.messages is not None and record.tokens_at is None]
        rendered = {id(record): self._render(record) for record in new}
        texts = [found for found in rendered.values() if not isinstance(found, BadRow)]
        tokens = tokenize_owned(self.context.tokenizer, texts, self.config.most)
        for record in batch:
            found = rendered.get(id(record))
            if isinstance(found, BadRow):
                yield Dropped(record, found.reason, found.detail)
                continue
            if found is not None:
                encoded = self._with_all(record, next(tokens))
                if isinstance(encoded, BadRow):
                    yield Dropped(record, encoded.reason, encoded.detail)
                    continue
                record.encoded = encoded
                record.tokens, record.trained = len(encoded.ids), encoded.supervised
                record.tokens_at = self.sink.add(encoded)
            yield Kept(record)

    def _with_all(self, record: Record, owned: Owned) -> Tokens | BadRow:
        """A document's tokens with their weights and what a teacher says of them, where there are such."""
        tokens = self._weighted(record, owned)
        return tokens if isinstance(tokens, BadRow) else self._with_teacher(record, tokens)

    def _with_teacher(self, record: Record, tokens: Tokens) -> Tokens | BadRow:
        """The tokens with what the row's teacher says of them, or what doesn't match; an answer that isn't trained has
        nothing to learn from a teacher."""
        from sft.data.tokenize.teacher import aligned

        said, last = record.teacher_top, max(self._said(record), default=-1)
        if said is None or last in self._untrained(record):
            return tokens
        found = aligned(tokens, said, self.config.most is None or len(tokens.ids) <= self.config.most)
        if not isinstance(found, int):
            return replace(tokens, top=found)
        text = self.context.tokenizer.decode(said.tokens[max(0, found - 3) : found + 1].clip(0))
        detail = f"the teacher's token {found} (the end of {text!r}) is no token of the text as it is tokenised"
        return BadRow("tokens_do_not_match", detail)
