"""DuckDB for decisions over all rows: it sorts and joins what doesn't fit into memory on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

MEMORY_LIMIT = "256MB"


def connect(scratch: Path, threads: int = 1) -> duckdb.DuckDBPyConnection:
    """An in-memory database that uses up to 256 MB and spills to `scratch`."""
    import duckdb

    connection = duckdb.connect(
        ":memory:",
        config={
            "memory_limit": MEMORY_LIMIT,
            "temp_directory": str(scratch),
            "threads": str(threads),
            "preserve_insertion_order": "false",
        },
    )
    # It would be drawn on standard output as soon as a query takes two seconds.
    connection.execute("set enable_progress_bar = false")
    return connection
