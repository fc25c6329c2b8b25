"""What a slow step has found out so far, on disk: a killed step doesn't do it again."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


class Journal:
    """JSON values by key. What `add` was given is on disk when it returns, all of it or, after a kill, nothing."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path)
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.execute("CREATE TABLE IF NOT EXISTS found (key TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID")

    def get(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are known."""
        found: dict[str, Any] = {}
        for key in keys:
            row = self._database.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
            if row is not None:
                found[key] = json.loads(row[0])
        return found

    def add(self, values: Mapping[str, Any]) -> None:
        """Note values; those of known keys are replaced."""
        with self._database:
            rows = [(key, json.dumps(value)) for key, value in values.items()]
            self._database.executemany("INSERT OR REPLACE INTO found VALUES (?, ?)", rows)

    def close(self) -> None:
        """Close the file."""
        self._database.close()
