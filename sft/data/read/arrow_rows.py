"""Rows of Arrow batches as Python values. A value that can't be one makes its row bad, and no other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from sft.data.read.row import BadRow, Row
from sft.utils.errors import first_line

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq


def parquet_batches(
    file: pq.ParquetFile, batch_rows: int, columns: Collection[str] | None, groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The rows of a file, or of some of its row groups, with those of the columns that it has (None: all)."""
    names = [name for name in file.schema_arrow.names if columns is None or name in columns]
    # Group by group: Arrow can't join the dictionaries of two groups inside a list.
    for group in groups if groups is not None else range(file.num_row_groups):
        for batch in file.iter_batches(batch_size=batch_rows, row_groups=[group], columns=names):
            yield batch.select(names)


def to_rows(name: str, line: int, batch: pa.RecordBatch) -> Iterator[Row]:
    """The rows of a batch, of which the first has the number `line`."""
    try:
        values = batch.to_pylist() if batch.num_columns else [{}] * batch.num_rows
    except Exception:  # what one value raises is Arrow's, datetime's, zoneinfo's or a codec's
        yield from (_row(name, line + at, batch, at) for at in range(batch.num_rows))
        return
    nested = [field.name for field in batch.schema if field.type.num_fields]
    for at, value in enumerate(values):
        yield Row(name, line + at, _given(value, nested))


def _row(name: str, line: int, batch: pa.RecordBatch, at: int) -> Row:
    value: dict[str, Any] = {}
    bad: BadRow | None = None
    for column, values in zip(batch.schema.names, batch.columns, strict=True):
        try:
            value[column] = values[at].as_py()
        except Exception as error:
            reason = "invalid_unicode" if isinstance(error, UnicodeDecodeError) else "unreadable_value"
            bad = bad or BadRow(reason, f"'{column}' can't be read: {first_line(error)}")
    return Row(name, line, None, bad, str(value)) if bad else Row(name, line, _given(value, list(value)))


def _given(value: dict[str, Any], nested: list[str]) -> dict[str, Any]:
    """A row without the nulls by which Arrow fills up mappings whose keys differ from row to row."""
    for column in nested:
        value[column] = _without_nulls(value[column])
    return value


def _without_nulls(found: Any) -> Any:
    if isinstance(found, dict):
        return {key: _without_nulls(value) for key, value in found.items() if value is not None}
    if isinstance(found, list) and any(isinstance(value, (dict, list)) for value in found):
        return [_without_nulls(value) for value in found]
    return found
