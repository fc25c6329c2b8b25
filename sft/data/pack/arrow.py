"""The rows that are trained on, as Arrow files: each written by one process, opened memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sft.data.read.record import Tokens
from sft.utils.files import sha256_file

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

BATCH_TOKENS = 1_000_000


class Document(NamedTuple):
    """One document of a row: its id, the name of its source, and its tokens."""

    id: str
    source: str
    tokens: Tokens


PackedRow = Sequence[Document]


def row_schema() -> pa.Schema:
    """The columns of a prepared row."""
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("assistant_masks", pa.list_(pa.uint8())),
            ("seq_lengths", pa.list_(pa.int32())),
            ("document_ids", pa.list_(pa.string())),
            ("document_sources", pa.list_(pa.string())),
        ]
    )


def write_rows(path: Path, rows: Iterable[PackedRow]) -> dict[str, Any]:
    """Write a file of rows, in batches; its name, rows, largest token id (-1: no tokens), bytes and hash."""
    import pyarrow as pa

    count, largest = 0, -1
    with open(path, "wb") as sink:
        with pa.ipc.new_stream(sink, row_schema()) as stream:
            for batch in _batches(rows):
                stream.write_batch(_record_batch(batch))
                count += len(batch)
                largest = max([largest, *(int(one.tokens.ids.max(initial=-1)) for row in batch for one in row)])
        sink.flush()
        os.fsync(sink.fileno())
    told = {"name": path.name, "rows": count, "largest_id": largest}
    return {**told, "bytes": path.stat().st_size, "sha256": sha256_file(path)}


def _batches(rows: Iterable[PackedRow]) -> Iterator[list[PackedRow]]:
    pending: list[PackedRow] = []
    tokens = 0
    for row in rows:
        pending.append(row)
        tokens += sum(len(document.tokens.ids) for document in row)
        if tokens >= BATCH_TOKENS:
            yield pending
            pending, tokens = [], 0
    if pending:
        yield pending


def _record_batch(rows: Sequence[PackedRow]) -> pa.RecordBatch:
    import pyarrow as pa

    documents = [document for row in rows for document in row]
    tokens = _offsets([sum(len(document.tokens.ids) for document in row) for row in rows])
    per_row = _offsets([len(row) for row in rows])
    lengths = np.array([len(document.tokens.ids) for document in documents], dtype=np.int32)
    ids = np.concatenate([document.tokens.ids for document in documents])
    masks = np.concatenate([document.tokens.mask for document in documents])
    columns = [
        pa.ListArray.from_arrays(tokens, pa.array(ids)),
        pa.ListArray.from_arrays(tokens, pa.array(masks)),
        pa.ListArray.from_arrays(per_row, pa.array(lengths)),
        pa.ListArray.from_arrays(per_row, pa.array([document.id for document in documents], pa.string())),
        pa.ListArray.from_arrays(per_row, pa.array([document.source for document in documents], pa.string())),
    ]
    return pa.record_batch(columns, schema=row_schema())


def _offsets(counts: Sequence[int]) -> pa.Array:
    import pyarrow as pa

    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def open_dataset(folder: Path, manifest: dict[str, Any]) -> datasets.Dataset:
    """The rows of a store as a memory-mapped `datasets.Dataset`."""
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / shard["name"])) for shard in manifest["shards"]]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
