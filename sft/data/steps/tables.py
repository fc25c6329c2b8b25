"""Reading sketches and writing verdicts through DuckDB."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.utils.errors import UserError, first_line

if TYPE_CHECKING:
    import duckdb


def parquet(files: Sequence[Path]) -> str:
    """The SQL that reads parquet files of one schema as a table."""
    return f"read_parquet([{', '.join(quoted(str(file)) for file in files)}])"


def quoted(text: str) -> str:
    """A text as SQL."""
    return "'" + text.replace("'", "''") + "'"


def write_parquet(db: duckdb.DuckDBPyConnection, query: str, target: Path) -> None:
    """Write what `query` gives to a parquet file, in the query's order where it has one.

    Raises UserError when memory or the disk below the file's folder is full.
    """
    import duckdb

    try:
        db.execute(f"COPY ({query}) TO {quoted(str(target))} (FORMAT parquet, ROW_GROUP_SIZE 16384)")
    except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
        raise UserError(
            f"{target.parent}: no room to decide on all rows at once ({first_line(error)}); free some disk space, "
            "or set `prepared_dir` to another disk."
        ) from error


def batches(db: duckdb.DuckDBPyConnection, query: str, target: Path, size: int) -> Iterator[list[tuple[Any, ...]]]:
    """The rows of a query, at most `size` at once, by way of the parquet file `target`, which is removed.

    DuckDB's own cursor first puts the whole result into memory, beside what its limit counts.
    """
    import pyarrow.parquet as pq

    write_parquet(db, query, target)
    with pq.ParquetFile(target, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=size, use_threads=False):
            yield list(zip(*(column.to_pylist() for column in batch.columns), strict=True))
    target.unlink()


def write_verdicts(db: duckdb.DuckDBPyConnection, dropped: Sequence[Path], kept: Path, target: Path) -> None:
    """Write `verdict_schema()`, sorted by row.

    Args:
        dropped: parquet files of row, reason and detail.
        kept: one of row, copies and facts, of the rows kept that there is something to say of.
    """
    columns = (
        '"row"::BIGINT AS "row", coalesce(copies, 0)::INTEGER AS copies, reason::VARCHAR AS reason,'
        " detail::VARCHAR AS detail, facts::VARCHAR AS facts"
    )
    # One scan of all files: a sort above a UNION doesn't spill to disk.
    files = f"{parquet([*dropped, kept])[:-1]}, union_by_name = true)"
    write_parquet(db, f'SELECT {columns} FROM {files} ORDER BY "row"', target)
