"""Reading sketches and writing verdicts through DuckDB."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb


def parquet(files: Sequence[Path]) -> str:
    """The SQL that reads parquet files of one schema as a table."""
    return f"read_parquet([{', '.join(quoted(str(file)) for file in files)}])"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def batches(db: duckdb.DuckDBPyConnection, query: str, target: Path, size: int) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a query, at most `size` at once, by way of the parquet file `target`, which is removed.

    DuckDB's own cursor first puts the whole result into memory, beside what its limit counts.
    """
    import pyarrow.parquet as pq

    db.execute(f"COPY ({query}) TO {quoted(str(target))} (FORMAT parquet, ROW_GROUP_SIZE 16384)")
    with pq.ParquetFile(target, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=size, use_threads=False):
            yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    target.unlink()


def write_verdicts(db: duckdb.DuckDBPyConnection, query: str, target: Path) -> None:
    """Write what `query` gives (row, copies, reason, detail, facts) as `verdict_schema()`, sorted by row."""
    columns = (
        '"row"::BIGINT AS "row", copies::INTEGER AS copies, reason::VARCHAR AS reason,'
        " detail::VARCHAR AS detail, facts::VARCHAR AS facts"
    )
    db.execute(f'COPY (SELECT {columns} FROM ({query}) ORDER BY "row") TO {quoted(str(target))} (FORMAT parquet)')
