"""Rows of token ids as Arrow files: written in batches, opened memory-mapped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft.utils.files import sha256_file

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

SHARD_TOKENS = 64_000_000  # 320 MB
BATCH_TOKENS = 1_000_000


def row_schema() -> pa.Schema:
    """The columns of a prepared row."""
    import pyarrow as pa

    return pa.schema(
        [
            ("input_ids", pa.list_(pa.int32())),
            ("assistant_masks", pa.list_(pa.uint8())),
            ("seq_lengths", pa.list_(pa.int32())),
            ("document_ids", pa.list_(pa.string())),
        ]
    )


class ShardWriter:
    """Writes rows to `<folder>/<stem>-00000.arrow` and on, in batches; memory holds one batch.

    A row is a list of documents, each (ids int32, mask uint8, document id).
    """

    def __init__(self, folder: Path, stem: str) -> None:
        self._folder, self._stem = folder, stem
        self._rows: list[Sequence[tuple[NDArray[np.int32], NDArray[np.uint8], str]]] = []
        self._pending_tokens = self._shard_tokens = 0
        self._sink: Any = None
        self._stream: Any = None
        self.shards: list[dict[str, Any]] = []

    def write(self, documents: Sequence[tuple[NDArray[np.int32], NDArray[np.uint8], str]]) -> None:
        """Add one row."""
        self._rows.append(documents)
        self._pending_tokens += sum(len(ids) for ids, _, _ in documents)
        if self._pending_tokens >= BATCH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Write what is pending; at least one shard is made, so that a store without rows can be opened."""
        self._flush()
        if self._stream is None and not self.shards:
            self._open()
        self._end_shard()

    def abandon(self) -> None:
        """Close the open file without caring for its content."""
        if self._sink is not None:
            self._sink.close()

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._stream is None:
            self._open()
        batch = _record_batch(self._rows)
        self._stream.write_batch(batch)
        self.shards[-1]["rows"] += batch.num_rows
        self._shard_tokens += self._pending_tokens
        self._rows, self._pending_tokens = [], 0
        if self._shard_tokens >= SHARD_TOKENS:
            self._end_shard()

    def _open(self) -> None:
        import pyarrow as pa

        name = f"{self._stem}-{len(self.shards):05d}.arrow"
        self._sink = open(self._folder / name, "wb")  # noqa: SIM115
        self._stream = pa.ipc.new_stream(self._sink, row_schema())
        self.shards.append({"name": name, "rows": 0})

    def _end_shard(self) -> None:
        if self._stream is None:
            return
        self._stream.close()
        self._sink.flush()
        os.fsync(self._sink.fileno())
        self._sink.close()
        self._stream = self._sink = None
        self._shard_tokens = 0
        path = self._folder / self.shards[-1]["name"]
        self.shards[-1].update(bytes=path.stat().st_size, sha256=sha256_file(path))


def _record_batch(rows: Sequence[Sequence[tuple[NDArray[np.int32], NDArray[np.uint8], str]]]) -> pa.RecordBatch:
    import pyarrow as pa

    documents = [document for row in rows for document in row]
    tokens = _offsets([sum(len(ids) for ids, _, _ in row) for row in rows])
    per_row = _offsets([len(row) for row in rows])
    lengths = np.array([len(ids) for ids, _, _ in documents], dtype=np.int32)
    ids = np.concatenate([ids for ids, _, _ in documents])
    masks = np.concatenate([mask for _, mask, _ in documents])
    columns = [
        pa.ListArray.from_arrays(tokens, pa.array(ids)),
        pa.ListArray.from_arrays(tokens, pa.array(masks)),
        pa.ListArray.from_arrays(per_row, pa.array(lengths)),
        pa.ListArray.from_arrays(per_row, pa.array([name for _, _, name in documents], pa.string())),
    ]
    return pa.record_batch(columns, schema=row_schema())


def _offsets(counts: Sequence[int]) -> pa.Array:
    import pyarrow as pa

    return pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))


class Documents:
    """Random access to the documents of an unpacked shard set, memory-mapped: index -> (ids, mask, id)."""

    def __init__(self, folder: Path, shards: Sequence[dict[str, Any]]) -> None:
        import pyarrow as pa

        self._batches: list[tuple[NDArray[np.int32], NDArray[np.uint8], NDArray[np.int32], pa.Array]] = []
        starts = [0]
        for shard in shards:
            with pa.memory_map(str(folder / shard["name"])) as source:
                for batch in pa.ipc.open_stream(source):
                    ids, masks, _, names = batch.columns
                    offsets = ids.offsets.to_numpy()
                    self._batches.append((ids.values.to_numpy(), masks.values.to_numpy(), offsets, names.values))
                    starts.append(starts[-1] + batch.num_rows)
        self._starts = np.array(starts)

    def take(self, indices: NDArray[np.int64]) -> list[tuple[NDArray[np.int32], NDArray[np.uint8], str]]:
        """The documents at `indices`, in that order."""
        batches = np.searchsorted(self._starts, indices, side="right") - 1
        taken = []
        for index, number in zip(indices.tolist(), batches.tolist(), strict=True):
            ids, masks, offsets, names = self._batches[number]
            at = index - int(self._starts[number])
            start, end = offsets[at], offsets[at + 1]
            taken.append((ids[start:end], masks[start:end], names[at].as_py()))
        return taken


def open_dataset(folder: Path, manifest: dict[str, Any]) -> datasets.Dataset:
    """The rows of a store as a memory-mapped `datasets.Dataset`."""
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / shard["name"])) for shard in manifest["shards"]]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)
