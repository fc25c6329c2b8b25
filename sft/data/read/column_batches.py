"""A few columns of a source as Arrow batches: rows with lists of 65K numbers are too large to be Python objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.read import hub, local
from sft.data.read.arrow_rows import parquet_batches
from sft.recipe.schema import Source
from sft.utils.errors import UserError, first_line

if TYPE_CHECKING:
    import pyarrow as pa

BATCH_ROWS = 16


def read_columns(source: Source, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    """(name of the batch's first row, at most BATCH_ROWS rows with these columns), in order.

    Raises UserError when there is no such source or column, a line isn't readable, or a value doesn't fit its column.
    """
    if not local.looks_local(str(source.path)):
        yield from _hub(source, columns)
        return
    for name, path in local.find_files(str(source.path), source.split, source.data_files, source.config):
        yield from _parquet(name, path, columns) if path.suffix == ".parquet" else _lines(name, path, columns)


def _hub(source: Source, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    data = hub.load_split(source)
    name = f"{source.path}:{source.split}"
    _check(name, columns, data.column_names)
    line = 1
    for table in data.select_columns(list(columns)).with_format("arrow").iter(batch_size=BATCH_ROWS):
        for batch in table.combine_chunks().to_batches():
            yield f"{name}:{line}", batch.select(list(columns))
            line += batch.num_rows


def _parquet(name: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            _check(str(path), columns, file.schema_arrow.names)
            line = 1
            for batch in parquet_batches(file, BATCH_ROWS, columns):
                yield f"{name}:{line}", batch.select(list(columns))
                line += batch.num_rows
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(f"{path}: not a readable parquet file: {first_line(error)}") from error


def _lines(name: str, path: Path, columns: Sequence[str]) -> Iterator[tuple[str, pa.RecordBatch]]:
    import pyarrow as pa

    every = local.read_files([(name, path)])
    while rows := list(islice(every, BATCH_ROWS)):
        values: list[dict[str, Any]] = []
        for row in rows:
            if row.bad is not None or row.value is None:
                raise UserError(f"{path}: line {row.line} is no row: {row.bad.detail if row.bad else 'unreadable'}.")
            _check(f"{path}: line {row.line}", columns, row.value)
            values.append({column: row.value[column] for column in columns})
        try:
            arrays = [pa.array([value[column] for value in values]) for column in columns]
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            last = rows[-1].line
            raise UserError(f"{path}: lines {rows[0].line} to {last} hold mixed values: {first_line(error)}") from error
        yield f"{name}:{rows[0].line}", pa.record_batch(arrays, names=list(columns))


def _check(where: str, columns: Sequence[str], there: Any) -> None:
    missing = [column for column in columns if column not in there]
    if missing:
        listed = ", ".join(sorted(there)[:20])
        raise UserError(f"{where}: there is no column '{missing[0]}'; it has: {listed}.")
