"""The step `join`: the teacher's tokens and their log probabilities, from another data set's row of the same id."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.read.column_batches import read_columns
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.read.sources import open_source
from sft.data.steps.base import RowStep
from sft.data.steps.join.teacher_index import TeacherIndex, open_index
from sft.recipe.schema import Source
from sft.recipe.steps.join import JoinStep
from sft.utils.errors import UserError

# Log-softmax in float32 may end this far above 0 for a token that is certain.
ROUNDING = 1e-5


class Join(RowStep):
    """Sets `teacher_ids` and `teacher_logprobs` as the other set has them, markers of the teacher's template and all.

    The first process copies the other set's columns into an index in the step's folder, 8 bytes a token.
    Reasons: no_match, bad_logprobs (not one for each token, above 0, or not finite). Facts: matched, tokens (how many).
    """

    config: JoinStep

    @classmethod
    def identity(cls, config: JoinStep) -> dict[str, Any]:
        """The other set's content. Raises UserError when it isn't there, is empty or lacks a column."""
        opened = open_source(_source(config))
        if next(_read(config), None) is None:
            raise UserError(f"{opened.name}: the set to join has no rows.")
        return {"other": opened.identity}

    @cached_property
    def _index(self) -> TeacherIndex:
        return open_index(self.context.folder, partial(_read, self.config))

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Raises UserError when the other set can't be read, or has an id twice."""
        return map(self._outcome, batch)

    def _outcome(self, record: Record) -> Outcome:
        found = self._index.get(record.id)
        if found is None:
            if self.config.missing == "drop":
                return Dropped(record, "no_match", f"no row of {self.config.path} has {self.config.on} = {record.id!r}")
            record.facts["join"] = {"matched": False}
            return Kept(record)
        ids, logprobs = found
        problem = _problem(ids, logprobs)
        if problem is not None:
            return Dropped(record, "bad_logprobs", problem)
        record.teacher_ids, record.teacher_logprobs = ids.tolist(), np.minimum(logprobs, 0).tolist()
        record.facts["join"] = {"matched": True, "tokens": len(ids)}
        return Kept(record)


def _source(config: JoinStep) -> Source:
    return Source(path=config.path, config=config.config, split=config.split, revision=config.revision)


def _read(config: JoinStep) -> Iterator[Any]:
    return read_columns(_source(config), (config.on, config.teacher_ids, config.teacher_logprobs))


def _problem(ids: NDArray[np.int32], logprobs: NDArray[np.float32]) -> str | None:
    if len(ids) != len(logprobs):
        return f"{len(ids)} tokens have {len(logprobs)} log probabilities"
    if not len(ids):
        return "there are no tokens"
    if (ids < 0).any():
        return f"token {int((ids < 0).argmax())} is no token id"
    wrong = ~(logprobs <= ROUNDING) | ~np.isfinite(logprobs)
    if wrong.any():
        at = int(wrong.argmax())
        return f"the log probability of token {at} is {logprobs[at]:g}"
    return None
