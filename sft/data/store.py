"""The prepared store: one folder per content key, whole or absent.

<root>/<key>/manifest.json      what it was made from, the funnel, the shards' sizes and hashes
<root>/<key>/rows-00000.arrow   the rows that are trained on (Arrow stream, opened memory-mapped)
<root>/<key>/quarantine.jsonl   bad rows      <root>/<key>/dropped.jsonl   rows that the policies dropped
<root>/<key>/truncated.jsonl    rows that were cut at max_length
<root>/.locks/<key>             held while a process builds <key>
<root>/.building-<key>          the folder being built; left behind by a kill, removed by the next run
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft.utils.errors import UserError, disk_full
from sft.utils.files import read_sealed, sha256_file, write_sealed
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

log = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
SHARD_TOKENS = 64_000_000  # 320 MB
BATCH_TOKENS = 1_000_000
_BUILDING = ".building-"
_LOCKS = ".locks"
LOCK_LIMIT = 24 * 3600.0
"""Seconds to wait for another process that builds the same store."""


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


def find(root: Path, key: str) -> dict[str, Any] | None:
    """The manifest of a whole store, or None. A store of which a byte is missing or changed is not whole."""
    folder = root / key
    manifest = read_sealed(folder / MANIFEST_FILE)
    if manifest is None or manifest.get("key") != key:
        return None
    shards = {shard["name"]: shard["sha256"] for shard in manifest["shards"]}
    return manifest if shards.items() <= folder_hashes(folder, tuple(shards)).items() else None


def open_dataset(folder: Path, manifest: dict[str, Any]) -> datasets.Dataset:
    """The rows of a store as a memory-mapped `datasets.Dataset`."""
    import datasets

    parts = [datasets.Dataset.from_file(str(folder / shard["name"])) for shard in manifest["shards"]]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


@contextmanager
def locked(root: Path, key: str) -> Iterator[None]:
    """Hold the right to build `key`; a second process waits here. The kernel releases it when a process dies."""
    with writable(root):
        (root / _LOCKS).mkdir(parents=True, exist_ok=True)
        handle = open(root / _LOCKS / key, "w")  # noqa: SIM115
    with handle:
        _wait_for_lock(handle, key)
        yield


def _wait_for_lock(handle: IO[str], key: str) -> None:
    limit = time.monotonic() + LOCK_LIMIT
    told = False
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > limit:
                raise UserError(f"Another process has been preparing {handle.name} for a day: end it first.") from None
            if not told:
                log.info("waiting for another process that prepares the same data (%s)", key)
            told = True
            time.sleep(0.1)


@contextmanager
def building(root: Path, key: str) -> Iterator[Path]:
    """A fresh folder to build `key` in, which the caller ends by `commit`; removed if the caller raises.

    The lock of `key` must be held. Leftovers of killed builds are removed first. Raises UserError when the disk is full
    or can't be written to.
    """
    _remove_leftovers(root, key)
    folder = root / f"{_BUILDING}{key}"
    try:
        with writable(root):
            folder.mkdir()
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def commit(root: Path, key: str, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and put the built folder in its place, in one rename."""
    write_sealed(folder / MANIFEST_FILE, manifest)
    for path in (folder / name for name in os.listdir(folder)):
        _sync(path)
    _sync(folder)
    target = root / key
    if target.exists():  # not whole, or we would not have built it
        shutil.rmtree(target)
    os.rename(folder, target)
    _sync(root)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path, key: str) -> None:
    for folder in root.glob(f"{_BUILDING}*"):
        other = folder.name.removeprefix(_BUILDING)
        if other == key:
            shutil.rmtree(folder)
            continue
        with open(root / _LOCKS / other, "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:  # its builder is alive
                continue
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writable(root: Path) -> Iterator[None]:
    """Turn the system's refusals to write into one sentence."""
    try:
        yield
    except OSError as error:
        if disk_full(error):
            raise UserError(
                f"{root}: no space left while preparing data; free some, or set `prepared_dir` to another disk."
            ) from error
        raise UserError(f"{root}: prepared data can't be written there: {error}; set `prepared_dir`.") from error
