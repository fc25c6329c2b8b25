"""A row of a source with the place it came from, and what is said about a row that can't be used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

PEEK_ROWS = 100
MOST_NESTED = 100
"""Python gives up at about a thousand, wherever the stack happens to end; templates take several for each."""


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


@dataclass(frozen=True)
class Part:
    """Neighbouring rows of a source, which another process can read by itself: `read` can be sent there."""

    read: Callable[[], Iterator[Row]]
    rows: int

    def first(self, limit: int) -> Part:
        """The part's first rows."""
        return self if self.rows <= limit else Part(partial(_first, self.read, limit), limit)


def _first(read: Callable[[], Iterator[Row]], limit: int) -> Iterator[Row]:
    return islice(read(), limit)


def deeper(found: Any, levels: int) -> bool:
    """Whether lists and mappings are nested more than so many levels deep."""
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return levels < 0 or any(deeper(value, levels - 1) for value in inner if isinstance(value, (dict, list)))


def characters_in(value: Any) -> int:
    """About how many characters a value takes as text, which isn't made: it may be large."""
    if isinstance(value, dict):
        return sum(len(str(key)) + characters_in(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return sum(map(characters_in, value))
    return len(value) if isinstance(value, (str, bytes)) else 8


def shortened(value: Any, most: int) -> Any:
    """A value of which only the beginning is looked at: its texts and lists are cut at `most`."""
    if isinstance(value, dict):
        return {key: shortened(inner, most) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shortened(inner, most) for inner in value[:most]]
    return value[:most] if isinstance(value, (str, bytes)) else value


def first_columns(rows: Iterable[Row]) -> set[str] | None:
    """The columns that the first readable rows have; None: no row can be read."""
    return counted_columns(rows, PEEK_ROWS)[1] or None


def counted_columns(rows: Iterable[Row], most: int) -> tuple[int, set[str]]:
    """How many readable rows were found, up to `most`, and their columns. No row is kept: it may be large."""
    count, names = 0, set[str]()
    for value in (row.value for row in rows):
        if value is not None:
            names |= value.keys()
            count += 1
        if count == most:
            break
    return count, names
