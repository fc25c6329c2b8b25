"""A row of a source with the place it came from, and what is said about a row that can't be used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

PEEK_ROWS = 100


@dataclass(frozen=True, slots=True)
class BadRow:
    """Why a row can't be used.

    `reason` is one of a fixed set of words (they are counted in the funnel); `detail` says what exactly was seen.
    """

    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    `source` names the file (or Hub split, or generator) and `line` the place in it, counted from 1. `value` is the
    row's mapping, or None when it could not be read: then `bad` says why and `raw` keeps what was found there.
    """

    source: str
    line: int
    value: dict[str, Any] | None
    bad: BadRow | None = None
    raw: str | None = None


def peek(rows: Iterator[Row]) -> tuple[Iterator[Row], set[str] | None]:
    """The same rows, and the columns that the first readable ones have (None: no row can be read)."""
    seen: list[Row] = []
    names: set[str] = set()
    readable = 0
    for row in rows:
        seen.append(row)
        if row.value is not None:
            names.update(row.value)
            readable += 1
            if readable >= PEEK_ROWS:
                break
    return chain(seen, rows), names if readable else None
