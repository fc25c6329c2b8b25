"""The step `filter`: rows by what a column says."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.base import RowStep
from sft.recipe.steps.filter import FIELDS, FilterStep


class Filter(RowStep):
    """Keeps rows whose value of a column is one of a list, or a number between limits."""

    version = 2
    config: FilterStep
    only_judges = True

    def __call__(self, batch: list[Record]) -> Iterator[Outcome]:
        """Reasons: filter_missing, filter_value, filter_range."""
        for record in batch:
            yield self._outcome(record)

    def _outcome(self, record: Record) -> Outcome:
        config, column = self.config, self.config.column
        value = getattr(record, column) if column in FIELDS else record.carried.get(column)
        number = _number(value)
        limited = config.min is not None or config.max is not None
        if value is None or (limited and number is None):
            return (
                Kept(record) if config.missing == "keep" else Dropped(record, "filter_missing", f"{column} is {value}")
            )
        if config.one_of is not None and _plain(value) not in map(_plain, config.one_of):
            return Dropped(record, "filter_value", f"{column} is {str(value)[:80]}")
        if config.none_of is not None and _plain(value) in map(_plain, config.none_of):
            return Dropped(record, "filter_value", f"{column} is {str(value)[:80]}")
        if limited and number is not None and not _between(number, config.min, config.max):
            return Dropped(record, "filter_range", f"{column} is {str(value)[:80]}")
        return Kept(record)


def _plain(value: Any) -> str:
    """Texts without case and outer spaces; true is "true"; 2 and 2.0 are the same."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().lower()


def _number(value: Any) -> int | float | None:
    """A number as it is, or a text that is one ("0.25"); None for "n/a"."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _between(number: float, low: float | None, high: float | None) -> bool:
    return (low is None or number >= low) and (high is None or number <= high)
