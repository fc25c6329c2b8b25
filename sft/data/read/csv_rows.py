"""Rows of a .csv file: comma-separated, with the columns' names in its first line."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from sft.data.read.row import BadRow, Part, Row
from sft.utils.errors import UserError

BOM = b"\xef\xbb\xbf"


@dataclass
class _Lines:
    """Lines of a file as text, and how many bytes and lines were taken. Bytes that aren't UTF-8 become halves of
    surrogate pairs, so that only what they stand in is bad."""

    handle: IO[bytes]
    taken: int = 0
    line: int = 1
    seen: list[str] = field(default_factory=list)

    def __iter__(self) -> Iterator[str]:
        for raw in self.handle:
            self.taken += len(raw)
            self.seen.append((raw.removeprefix(BOM) if self.line == 1 else raw).decode("utf-8", "surrogateescape"))
            self.line += 1
            yield self.seen[-1]


def csv_columns(path: Path) -> list[str]:
    """The columns' names. Raises UserError where there are none, or two of one name."""
    with path.open("rb") as handle:
        names = next((value for _, value in _records(_Lines(handle)) if value != []), [])
    if isinstance(names, BadRow) or len(set(names)) != len(names) or any(not name.isprintable() for name in names):
        raise UserError(f"{path}: the first line of a .csv file must name its columns, each by a name of its own.")
    return names


def read_csv(name: str, path: Path) -> Iterator[Row]:
    """Every row, with the number of the line in which it begins."""
    for part in csv_parts(name, path, sys.maxsize):
        yield from part.read()


def csv_parts(name: str, path: Path, rows: int) -> list[Part]:
    """The rows in parts of `rows`."""
    columns = csv_columns(path)
    parts, count = list[Part](), 0
    with path.open("rb") as handle:
        lines = _Lines(handle)
        header, start, begun = True, 0, 1
        for _, value in _records(lines):
            if header:
                header = value == []
                start, begun = lines.taken, lines.line
                continue
            count += value != []
            if count == rows:
                parts.append(Part(partial(_read, name, path, columns, start, begun, rows), count))
                start, begun, count = lines.taken, lines.line, 0
    if count:
        parts.append(Part(partial(_read, name, path, columns, start, begun, count), count))
    return parts


def _read(name: str, path: Path, columns: list[str], start: int, line: int, rows: int) -> Iterator[Row]:
    """`rows` rows from a place in the file on, which is the beginning of the line with the number `line`."""
    with path.open("rb") as handle:
        handle.seek(start)
        lines = _Lines(handle, line=line)
        for begun, value in _records(lines):
            if value == []:
                continue
            if isinstance(value, list) and len(value) != len(columns):
                value = BadRow("broken_csv", f"{len(value)} values for {len(columns)} columns")
            if isinstance(value, BadRow):
                raw = "".join(lines.seen).rstrip("\r\n").encode("utf-8", "surrogateescape")
                yield Row(name, begun, None, value, raw.decode("utf-8", "backslashreplace"))
            else:
                yield Row(name, begun, dict(zip(columns, value, strict=True)))
            rows -= 1
            if not rows:
                return


def _records(lines: _Lines) -> Iterator[tuple[int, list[str] | BadRow]]:
    """The line in which each record begins, and its values; an empty line has none.

    Raises UserError where a quote is never closed: all that follows would be one row.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(iter(lines), strict=True)
    while True:
        begun = lines.line
        lines.seen.clear()
        try:
            yield begun, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise UserError(
                    f"{lines.handle.name}: the row in line {begun} has a quote that is never closed."
                ) from error
            yield begun, BadRow("broken_csv", str(error))
