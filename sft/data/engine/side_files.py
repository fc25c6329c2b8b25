"""Side files of the store: bad rows with their content, dropped ones and those that were cut with their place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sft.data.read.row import BadRow, Row

QUARANTINE_FILE = "quarantine.jsonl"
DROPPED_FILE = "dropped.jsonl"
TRUNCATED_FILE = "truncated.jsonl"


class SideFiles:
    """Writes `quarantine.jsonl`, `dropped.jsonl` and `truncated.jsonl` into `folder`, and counts what went there."""

    def __init__(self, folder: Path) -> None:
        self.bad: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.truncated = 0
        self._quarantine: IO[str] = open(folder / QUARANTINE_FILE, "w", encoding="utf-8")  # noqa: SIM115
        self._dropped: IO[str] = open(folder / DROPPED_FILE, "w", encoding="utf-8")  # noqa: SIM115
        self._truncated: IO[str] = open(folder / TRUNCATED_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> SideFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in (self._quarantine, self._dropped, self._truncated):
            handle.close()

    def quarantine(self, row: Row, bad: BadRow) -> None:
        """Put a bad row aside: source, line, reason, detail and the row itself (or its raw text)."""
        self.bad[bad.reason] += 1
        content: Any = row.value if row.value is not None else row.raw
        record = {"source": row.source, "line": row.line, "reason": bad.reason, "detail": bad.detail, "row": content}
        self._quarantine.write(_line(record))

    def drop(self, row: Row, row_id: str, reason: str, tokens: int) -> None:
        """Note a good row that isn't trained on: source, line, id, reason and its length in tokens."""
        self.dropped[reason] += 1
        record = {"source": row.source, "line": row.line, "id": row_id, "reason": reason, "tokens": tokens}
        self._dropped.write(_line(record))

    def cut(self, row: Row, row_id: str, tokens: int) -> None:
        """Note a row that is trained on up to max_length only: source, line, id and its whole length in tokens."""
        self.truncated += 1
        record = {"source": row.source, "line": row.line, "id": row_id, "tokens": tokens}
        self._truncated.write(_line(record))


def read_side_file(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a side file, one after the other: none of them need fit into memory whole."""
    with open(path, encoding="utf-8") as handle:
        for line in handle:
            yield json.loads(line)


def _line(record: dict[str, Any]) -> str:
    # ASCII, so that half surrogates survive; str() for the types that only parquet has (dates, bytes).
    return json.dumps(record, ensure_ascii=True, default=str) + "\n"
