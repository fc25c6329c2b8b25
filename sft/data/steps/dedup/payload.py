"""What the greedy pass of `dedup` reads at random places, in files: texts by number, and who stays of each bucket."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import pyarrow as pa

# Texts held in memory: those that many are compared with come again and again.
_CACHED = 1024


class Payload(NamedTuple):
    """The stored shingles (n,) of a text, and its tokens with spaces between, or nothing."""

    shingles: npt.NDArray[np.uint32]
    text: str


class PayloadFile:
    """Payloads of up to `count` texts in one file; in memory are 24 bytes for each text."""

    def __init__(self, path: Path, count: int) -> None:
        self._file = path.open("w+b")
        self._places = np.zeros((count, 3), np.int64)  # where its shingles begin, its text begins, and that ends
        self._end = 0
        self._cache: dict[int, Payload] = {}

    def add(self, batch: pa.RecordBatch) -> None:
        """Store the rows of columns node (number of the text), shingles, text."""
        for place, node in enumerate(batch.column(0).to_pylist()):
            shingles = batch.column(1)[place].values.to_numpy().tobytes()
            text = batch.column(2)[place].as_py().encode("utf-8")
            middle = self._end + len(shingles)
            self._places[node] = (self._end, middle, middle + len(text))
            self._end = middle + len(text)
            self._file.write(shingles + text)
        self._file.flush()

    def __getitem__(self, node: int) -> Payload:
        found = self._cache.get(node)
        if found is None:
            start, middle, end = self._places[node].tolist()
            data = os.pread(self._file.fileno(), end - start, start)
            found = Payload(np.frombuffer(data[: middle - start], np.uint32), data[middle - start :].decode("utf-8"))
            if len(self._cache) >= _CACHED:
                self._cache.clear()
            self._cache[node] = found
        return found

    def __enter__(self) -> PayloadFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class Buckets:
    """Of each bucket, the first few texts that stay, in a mapped file: pages not in use needn't be in memory."""

    def __init__(self, path: Path, buckets: int, most: int) -> None:
        self._nodes = np.memmap(path, np.int64, "w+", shape=(max(buckets, 1), most + 1))
        # The first column counts those that are there.
        self._most = most

    def met(self, buckets: npt.NDArray[np.int64]) -> list[int]:
        """The texts in `buckets`: those in most of them first, then in the order of their numbers."""
        rows = self._nodes[buckets]
        there = rows[:, 1:][np.arange(self._most) < rows[:, :1]]
        nodes, counts = np.unique(there, return_counts=True)
        return [int(node) for node in nodes[np.argsort(-counts, kind="stable")]]

    def add(self, node: int, buckets: npt.NDArray[np.int64]) -> None:
        """Put a text that stays into `buckets`, as far as they have room."""
        room = buckets[self._nodes[buckets, 0] < self._most]
        self._nodes[room, 0] += 1
        self._nodes[room, self._nodes[room, 0]] = node
