"""Where rows go that aren't trained on: bad ones with their content, dropped ones with their place."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from sft.data.rows import BadRow, Row

QUARANTINE_FILE = "quarantine.jsonl"
DROPPED_FILE = "dropped.jsonl"


class SideFiles:
    """Writes `quarantine.jsonl` and `dropped.jsonl` into `folder` and counts what went there by reason."""

    def __init__(self, folder: Path) -> None:
        self.bad: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self._quarantine: IO[str] = open(folder / QUARANTINE_FILE, "w", encoding="utf-8")  # noqa: SIM115
        self._dropped: IO[str] = open(folder / DROPPED_FILE, "w", encoding="utf-8")  # noqa: SIM115

    def __enter__(self) -> SideFiles:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in (self._quarantine, self._dropped):
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


def _line(record: dict[str, Any]) -> str:
    # ASCII, so that half surrogates survive; str() for the types that only parquet has (dates, bytes).
    return json.dumps(record, ensure_ascii=True, default=str) + "\n"
