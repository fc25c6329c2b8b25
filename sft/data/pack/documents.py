"""The documents of a stage: what is left after all steps, with the address of its tokens and how many of them count."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sft.data.pack.arrow import Document
from sft.data.pack.tokens import TokenFiles
from sft.data.read.record import Record
from sft.utils.files import PartFile

BATCH = 8192


class DocumentsWriter(PartFile):
    """Writes the documents of a shard to `path`, under a temporary name until `finish`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._rows: list[tuple[str, str, str, int, int, int]] = []

    def add(self, record: Record) -> None:
        """Add a row whose tokens are stored."""
        assert record.tokens_at is not None and record.tokens is not None and record.trained is not None
        top_k = record.teacher_top.top.ids.shape[1] if record.teacher_top is not None else 0
        self._rows.append((record.id, record.source, record.tokens_at, record.tokens, record.trained, top_k))
        if len(self._rows) >= BATCH:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        kinds = {name: pa.string() for name in ("id", "source", "tokens_at")}
        kinds |= {name: pa.int32() for name in ("length", "supervised", "top_k")}
        schema = pa.schema(list(kinds.items()))
        self._writer = self._writer or pa.ipc.new_file(self.temporary, schema)
        columns = list(zip(*self._rows, strict=True)) or [()] * len(kinds)
        arrays = [pa.array(values, kind) for values, kind in zip(columns, kinds.values(), strict=True)]
        self._writer.write_batch(pa.record_batch(arrays, schema=schema))
        self._rows = []


def documents_path(folder: Path, number: int) -> Path:
    """Where the documents of a shard are."""
    return folder / f"documents-{number:05d}.arrow"


class Documents:
    """The documents of several files, in order, by their number; mapped, not read.

    `root`: the folder of all passes, where their tokens are.
    """

    def __init__(self, root: Path, files: Sequence[Path]) -> None:
        import pyarrow as pa

        self._tokens, self._batches = TokenFiles(root), []
        for path in files:
            with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as file:
                self._batches += [file.get_batch(number) for number in range(file.num_record_batches)]
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def column(self, name: str) -> NDArray[np.int64]:
        """`length`, `supervised` or `top_k` (tokens that a teacher names at a place) of every document (n,)."""
        parts = [batch.column(name).to_numpy().astype(np.int64) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def take(self, numbers: Sequence[int]) -> list[Document]:
        """Documents by their numbers, with their tokens as far as they count."""
        taken = []
        for number in numbers:
            place = int(np.searchsorted(self._starts, number, side="right")) - 1
            columns = self._batches[place].slice(number - int(self._starts[place]), 1).columns
            name, source, address, length = (column[0].as_py() for column in columns[:4])
            taken.append(Document(name, source, self._tokens[address].first(length)))
        return taken
