"""The rows that are trained on, as Arrow files: each written by one process, opened memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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


def row_schema(top_k: int = 0, weighted: bool = False) -> pa.Schema:
    """The columns of a prepared row; with `top_k` also what a teacher says of each trained token, in order; `weighted`:
    with the weight of each token's loss."""
    import pyarrow as pa

    columns = {
        "input_ids": pa.int32(),
        "assistant_masks": pa.uint8(),
        "seq_lengths": pa.int32(),
        "document_ids": pa.string(),
        "document_sources": pa.string(),
        **({"loss_weights": pa.float64()} if weighted else {}),
    }
    if top_k:
        columns |= {"teacher_ids": pa.list_(pa.int32(), top_k), "teacher_logprobs": pa.list_(pa.float16(), top_k)}
    return pa.schema([(name, pa.list_(kind)) for name, kind in columns.items()])


def write_rows(path: Path, rows: Iterable[PackedRow], top_k: int = 0, weighted: bool = False) -> dict[str, Any]:
    """Write a file of rows, in batches; its name, rows, largest token id (-1: no tokens), bytes and hash."""
    import pyarrow as pa

    count, largest = 0, -1
    with open(path, "wb") as sink:
        with pa.ipc.new_stream(sink, row_schema(top_k, weighted)) as stream:
            for batch in _batches(rows):
                stream.write_batch(_record_batch(batch, top_k, weighted))
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
        tokens += sum(len(document.tokens.ids) + _top_size(document.tokens) for document in row)
        if tokens >= BATCH_TOKENS:
            yield pending
            pending, tokens = [], 0
    if pending:
        yield pending


def _top_size(tokens: Tokens) -> int:
    return tokens.top.ids.size if tokens.top is not None else 0


def _record_batch(rows: Sequence[PackedRow], top_k: int, weighted: bool) -> pa.RecordBatch:
    import pyarrow as pa

    documents = [document for row in rows for document in row]
    parts = [document.tokens for document in documents]
    tokens = _offsets([sum(len(document.tokens.ids) for document in row) for row in rows])
    per_row = _offsets([len(row) for row in rows])
    lengths = np.array([len(part.ids) for part in parts], dtype=np.int32)
    ids = np.concatenate([part.ids for part in parts])
    masks = np.concatenate([part.mask for part in parts])
    columns = [
        pa.ListArray.from_arrays(tokens, pa.array(ids)),
        pa.ListArray.from_arrays(tokens, pa.array(masks)),
        pa.ListArray.from_arrays(per_row, pa.array(lengths)),
        pa.ListArray.from_arrays(per_row, pa.array([document.id for document in documents], pa.string())),
        pa.ListArray.from_arrays(per_row, pa.array([document.source for document in documents], pa.string())),
    ]
    if weighted:
        weights = np.concatenate([part.weights for part in parts if part.weights is not None])
        columns.append(pa.ListArray.from_arrays(tokens, pa.array(weights)))
    if top_k:
        trained = _offsets([sum(document.tokens.supervised for document in row) for row in rows])
        for values in zip(*(_top(part, top_k) for part in parts), strict=True):
            places = pa.FixedSizeListArray.from_arrays(pa.array(np.concatenate(values).ravel()), top_k)
            columns.append(pa.ListArray.from_arrays(trained, places))
    return pa.record_batch(columns, schema=row_schema(top_k, weighted))


def _top(tokens: Tokens, top_k: int) -> tuple[NDArray[np.int32], NDArray[np.float16]]:
    """(ids, log probabilities) at each trained token, (n, top_k); -1 and 0 where the teacher says nothing."""
    shape = (tokens.supervised, top_k)
    ids, logprobs = np.full(shape, -1, np.int32), np.zeros(shape, np.float16)
    if tokens.top is not None:
        count = tokens.top.ids.shape[1]
        ids[:, :count], logprobs[:, :count] = tokens.top.ids, tokens.top.logprobs
    return ids, logprobs


def _offsets(counts: Sequence[int]) -> pa.Array:
    import pyarrow as pa

    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


def open_dataset(folder: Path, manifest: dict[str, Any]) -> datasets.Dataset:
    """The rows of a store as a memory-mapped `datasets.Dataset`."""
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / shard["name"])) for shard in manifest["shards"]]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
