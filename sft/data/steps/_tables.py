"""Reading sketches and writing verdicts through DuckDB."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb


def parquet(files: Sequence[Path]) -> str:
    """The SQL that reads parquet files of one schema as a table."""
    return f"read_parquet([{', '.join(quoted(str(file)) for file in files)}])"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def write_verdicts(db: duckdb.DuckDBPyConnection, query: str, target: Path) -> None:
    """Write what `query` gives (row, copies, reason, detail, facts) as `verdict_schema()`, sorted by row."""
    columns = (
        '"row"::BIGINT AS "row", copies::INTEGER AS copies, reason::VARCHAR AS reason,'
        " detail::VARCHAR AS detail, facts::VARCHAR AS facts"
    )
    db.execute(f'COPY (SELECT {columns} FROM ({query}) ORDER BY "row") TO {quoted(str(target))} (FORMAT parquet)')
