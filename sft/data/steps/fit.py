"""The last step, which no recipe names: what may be trained on is no longer than a row, and has something to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sft.data.pack.tokens import TokenFiles
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.data.steps.tokenize import most_tokens
from sft.utils.errors import UserError


@dataclass(frozen=True)
class FitSettings:
    """`max_length`: tokens of the longest row (None: no limit); `over_length`: what becomes of longer ones."""

    max_length: int | None
    over_length: Literal["drop", "truncate", "error"]


class Fit(RowStep):
    """Applies the length policy, then demands a supervised token (a truncated document may have lost all of them).

    Reasons: over_length, no_supervised_token, no_conversation (a problem without an answer).
    """

    config: FitSettings
    passes: Path

    @classmethod
    def settings(cls, config: FitSettings) -> dict[str, Any]:
        """All of them."""
        return asdict(config)

    @cached_property
    def _tokens(self) -> TokenFiles:
        return TokenFiles(self.passes)

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Raises UserError for a row that is too long where the recipe says `over_length: error`."""
        return map(self._outcome, batch)

    def _outcome(self, record: Record) -> Outcome:
        limit, tokens = self.config.max_length, record.tokens
        if tokens is None or record.tokens_at is None:
            return Dropped(record, "no_conversation", "a problem without an answer")
        cut = None
        if limit is not None and tokens > limit:
            # A text beyond that needn't have been read to its end.
            told = f"{'at least ' if tokens > (most_tokens(limit) or tokens) else ''}{tokens} tokens"
            if self.config.over_length == "error":
                raise UserError(
                    f"{record.place}: {told} are more than train.max_length {limit}; raise it, or set "
                    "data.over_length to drop or truncate."
                )
            if self.config.over_length == "drop":
                return Dropped(record, "over_length", told)
            whole = record.encoded or self._tokens[record.tokens_at]
            record.tokens, record.trained, cut = limit, int(whole.mask[:limit].sum()), told
        if not record.trained:
            return Dropped(record, "no_supervised_token", f"{tokens} tokens, none of them trained")
        return Kept(record, cut)
