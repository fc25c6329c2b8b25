"""What comparing two texts takes, on disk: written once in any order, read by number."""

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
