"""The step `length`: rows that are too short or too long go."""

from __future__ import annotations

from collections.abc import Iterator

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.recipe.steps.length import LengthStep


class Length(RowStep):
    """Drops rows by their number of tokens under the chat template, all or those that are learned."""

    config: LengthStep
    only_judges = True
    reads_tokens = True

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Reasons: too_short, too_long, no_conversation (a problem without an answer has no length)."""
        for record in batch:
            tokens = record.tokens if self.config.of == "all" else record.trained
            if tokens is None:
                yield Dropped(record, "no_conversation", "a problem without an answer has no length")
            elif tokens < self.config.min_tokens:
                yield Dropped(record, "too_short", f"{tokens} tokens")
            elif self.config.max_tokens is not None and tokens > self.config.max_tokens:
                yield Dropped(record, "too_long", f"{tokens} tokens")
            else:
                yield Kept(record)
