"""Finding rows and documents in a prepared stage, and what was put aside on the way to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sft.data.engine.shards import CUT
from sft.data.prepare import PreparedStage
from sft.utils.errors import UserError


def check_row(prepared: PreparedStage, number: int) -> int:
    """`number`, when the stage has such a row. Raises UserError."""
    if number >= len(prepared.dataset):
        raise UserError(f"There is no row {number}: the stage's {len(prepared.dataset)} rows are counted from 0.")
    return number


def rows_with(prepared: PreparedStage, row_id: str) -> list[int]:
    """Numbers of the rows that hold the document `row_id`, or one that was made from it (`row_id#...`)."""
    import pyarrow.compute as pc

    found, start = [], 0
    for chunk in prepared.dataset.data.column("document_ids").chunks:
        names = chunk.flatten()
        mine = pc.or_(pc.equal(names, row_id), pc.starts_with(names, f"{row_id}#"))
        found += [start + parent for parent in pc.list_parent_indices(chunk).filter(mine).unique().to_pylist()]
        start += len(chunk)
    return found


def same_row(name: str, row_id: str) -> bool:
    """Whether the document `name` is the row `row_id`, or was made from it."""
    return name == row_id or name.startswith(f"{row_id}#")


def put_aside(prepared: PreparedStage, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """Every row that a step dropped, and those that were cut, pass by pass: the columns of a row as it was then, and
    `step`, `reason` and `detail`. `columns`: only these."""
    import pyarrow.parquet as pq

    for path in _aside(prepared):
        with pq.ParquetFile(path, pre_buffer=False) as file:
            for batch in file.iter_batches(columns=columns and list(columns)):
                yield from batch.to_pylist()


def _aside(prepared: PreparedStage) -> Iterator[Path]:
    for folder in prepared.passes:
        yield from sorted(folder.glob("aside-*.parquet"))


def _cut(prepared: PreparedStage) -> Iterator[tuple[str, int]]:
    for row in put_aside(prepared, ("id", "reason", "detail")):
        if row["reason"] == CUT:
            yield row["id"], int(row["detail"].split()[0])


def cut_lengths(prepared: PreparedStage, rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], int]:
    """Of the documents of `rows` that were cut at max_length: (id, length) -> whole length in tokens."""
    limit = prepared.manifest["recipe"]["max_length"]
    # Only a document that fills max_length can be one that was cut.
    full = {
        name
        for row in rows
        for name, length in zip(row["document_ids"], row["seq_lengths"], strict=True)
        if length == limit
    }
    if not full or not prepared.manifest["funnel"]["truncated"]:
        return {}
    return {(name, limit): tokens for name, tokens in _cut(prepared) if name in full}


def first_cut(prepared: PreparedStage, limit: int) -> list[tuple[str, int]]:
    """(id, whole length in tokens) of the first `limit` documents that were cut at max_length."""
    return list(islice(_cut(prepared), limit)) if prepared.manifest["funnel"]["truncated"] else []
