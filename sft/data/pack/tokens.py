"""Ids and masks of conversations in files of their own: written once, found by their address from then on.

An address is `<folder>/<file>:<row>`, relative to the folder of all passes. Uncompressed Arrow: 3 bytes a token and a
bit, read at random through mapped memory. (No tokenizer has more than 2^24 ids.) A teacher's likeliest tokens take 6
bytes each.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from sft.data.read.record import Tokens, TopLogprobs
from sft.utils.files import PartFile

BATCH_TOKENS = 1_000_000
_NOTHING = TopLogprobs(np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float16))


class TokensWriter(PartFile):
    """Writes the tokens of a shard to `path`, under a temporary name until `finish`; `weighted`: with weights."""

    def __init__(self, path: Path, weighted: bool = False) -> None:
        super().__init__(path)
        self.weighted = weighted
        self._rows: list[Tokens] = []
        self._pending = self._count = 0

    def add(self, tokens: Tokens) -> str:
        """Write one document; its address."""
        self._rows.append(tokens)
        self._pending += len(tokens.ids) + (tokens.top.ids.size if tokens.top is not None else 0)
        if self._pending >= BATCH_TOKENS:
            self._flush()
        self._count += 1
        return f"{self.path.parent.name}/{self.path.name}:{self._count - 1}"

    def _flush(self) -> None:
        import pyarrow as pa

        kinds = {"low": pa.uint16(), "high": pa.uint8(), "mask": pa.bool_()}
        if self.weighted:
            kinds["weights"] = pa.float64()
        kinds |= {"top_ids": pa.int32(), "top_logprobs": pa.float16()}
        schema = pa.schema([(name, pa.list_(kind)) for name, kind in kinds.items()])
        self._writer = self._writer or pa.ipc.new_file(self.temporary, schema)
        if not self._rows:
            return
        ends = np.cumsum([0, *(len(tokens.ids) for tokens in self._rows)]).astype(np.int32)
        ids = np.concatenate([tokens.ids for tokens in self._rows])
        mask = np.concatenate([tokens.mask for tokens in self._rows]).astype(bool)
        values = [ids.astype(np.uint16), (ids >> 16).astype(np.uint8), mask]
        if self.weighted:
            values.append(np.concatenate([tokens.weights for tokens in self._rows if tokens.weights is not None]))
        columns = [pa.ListArray.from_arrays(pa.array(ends), pa.array(part)) for part in values]
        tops = [tokens.top or _NOTHING for tokens in self._rows]
        sizes = pa.array(np.cumsum([0, *(top.ids.size for top in tops)]).astype(np.int32))
        for parts in ([top.ids for top in tops], [top.logprobs for top in tops]):
            columns.append(pa.ListArray.from_arrays(sizes, pa.array(np.concatenate([part.ravel() for part in parts]))))
        self._writer.write_batch(pa.record_batch(columns, schema=schema))
        self._rows, self._pending = [], 0


class TokenFiles:
    """Documents by their addresses below `root`, the folder of all passes. Files stay mapped as long as this lives."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._open: dict[str, tuple[np.ndarray, list[Any]]] = {}

    def __getitem__(self, address: str) -> Tokens:
        name, _, row = address.rpartition(":")
        starts, batches = self._open.get(name) or self._opened(name)
        number = int(np.searchsorted(starts, int(row), side="right")) - 1
        place, batch = int(row) - int(starts[number]), batches[number]
        stored = {name: batch.column(name)[place].values for name in batch.schema.names}
        found = {name: column.to_numpy(zero_copy_only=False) for name, column in stored.items()}
        ids = found["low"].astype(np.int32) | found["high"].astype(np.int32) << 16
        mask, top = found["mask"].view(np.uint8), None
        if len(found["top_ids"]):
            shape = (int(mask.sum()), -1)
            top = TopLogprobs(found["top_ids"].reshape(shape), found["top_logprobs"].reshape(shape))
        return Tokens(ids, mask, top, found.get("weights"))

    def _opened(self, name: str) -> tuple[np.ndarray, list[Any]]:
        """Where each batch of a file begins, and the batches."""
        import pyarrow as pa

        with pa.memory_map(str(self._root / name)) as source, pa.ipc.open_file(source) as file:
            batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        starts = np.cumsum([0, *(batch.num_rows for batch in batches)])[:-1]
        self._open[name] = starts, batches
        return self._open[name]
