"""Token ids and log probabilities on disk, found by a row's id: built once, read by any number of processes.

<folder>/keys.npy       (n,) first 16 bytes of BLAKE2b of the ids, ascending
<folder>/spans.npy      (n, 4) of each key: first and last + 1 of its token ids, and of its log probabilities
<folder>/ids.bin        int32        <folder>/logprobs.bin        float32

All are memory-mapped: a process holds what it looks at. On disk a token takes 8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sft.data import store
from sft.data.read.record import text_hash
from sft.utils.errors import UserError
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    import pyarrow as pa

    Batches = Iterator[tuple[str, pa.RecordBatch]]

_NAME = "index"
_KEY = "S16"


def open_index(root: Path, read: Callable[[], Batches]) -> TeacherIndex:
    """The index in `root`, built from what `read` gives by the first process that asks while the others wait.

    What a killed process left half built is removed and built again.

    Args:
        read: gives batches from the first on, if there is no index: (name of the batch's first row, batch with the
            columns id, token ids, log probabilities in this order).
    Raises:
        UserError: an id is missing or twice there, a column isn't what it must be, or the disk is full.
    """
    if store.find(root, _NAME) is None:
        with store.locked(root, _NAME):
            if store.find(root, _NAME) is None:
                with store.building(root, _NAME) as folder:
                    _build(folder, read)
                    files = [{"name": name, "sha256": content} for name, content in folder_hashes(folder).items()]
                    store.commit(root, _NAME, folder, {"key": _NAME, "shards": files})
    return TeacherIndex(root / _NAME)


class TeacherIndex:
    """Random access by id."""

    def __init__(self, folder: Path) -> None:
        self._keys = np.load(folder / "keys.npy", mmap_mode="r")
        self._spans = np.load(folder / "spans.npy", mmap_mode="r")
        self._ids = _mapped(folder / "ids.bin", np.int32)
        self._logprobs = _mapped(folder / "logprobs.bin", np.float32)

    def __len__(self) -> int:
        return len(self._keys)

    def get(self, name: str) -> tuple[NDArray[np.int32], NDArray[np.float32]] | None:
        """Token ids (n,) and log probabilities (m,) of the row `name`, as they are in the other set; None: not there.

        A missing or too large id is -1, a missing log probability NaN.
        """
        key = np.array(_key(name), dtype=_KEY)
        at = int(np.searchsorted(self._keys, key))
        if at == len(self._keys) or self._keys[at] != key:
            return None
        first, end, first_logprob, end_logprob = self._spans[at].tolist()
        return self._ids[first:end], self._logprobs[first_logprob:end_logprob]


def _key(name: str) -> bytes:
    return text_hash(name).to_bytes(16, "big")


def _mapped(path: Path, dtype: Any) -> NDArray[Any]:
    # An empty file can't be mapped.
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


def _build(folder: Path, read: Callable[[], Batches]) -> None:
    """Memory holds one batch, and some 50 bytes of each row."""
    keys: list[NDArray[Any]] = [np.empty(0, dtype=_KEY)]
    spans: list[NDArray[np.int64]] = [np.empty((0, 4), dtype=np.int64)]
    with (folder / "ids.bin").open("wb") as ids_file, (folder / "logprobs.bin").open("wb") as logprobs_file:
        ids, logprobs = _Lists(ids_file, _token_ids), _Lists(logprobs_file, _log_probabilities)
        for place, batch in read():
            keys.append(np.array([_key(name) for name in _names(place, batch)], dtype=_KEY))
            spans.append(np.concatenate([ids.write(place, batch, 1), logprobs.write(place, batch, 2)], axis=1))
    found = np.concatenate(keys)
    order = np.argsort(found, kind="stable")
    twice = np.flatnonzero(found[order][1:] == found[order][:-1])
    if len(twice):
        raise UserError(_two_rows(read(), order[twice[0]], order[twice[0] + 1]))
    np.save(folder / "keys.npy", found[order])
    np.save(folder / "spans.npy", np.concatenate(spans)[order])


def _names(place: str, batch: pa.RecordBatch) -> list[str]:
    names = batch.column(0).to_pylist()
    if None in names:
        raise UserError(f"{place}: row {names.index(None) + 1} from there on has no '{batch.schema.names[0]}'.")
    return [str(name) for name in names]


def _two_rows(batches: Batches, first: int, second: int) -> str:
    start, places = 0, []
    for place, batch in batches:
        names = _names(place, batch)
        places += [(place, names[at - start]) for at in (first, second) if start <= at < start + len(names)]
        start += len(names)
        if len(places) == 2:
            break
    (place, name), (other, _) = places
    return f"the id {name!r} is twice in the set to join (at or after {place}, and {other}); make its rows unique."


class _Lists:
    """Appends a column's lists to a file of numbers."""

    def __init__(self, file: IO[bytes], convert: Callable[[pa.Array], NDArray[Any] | None]) -> None:
        self._file, self._convert, self._written = file, convert, 0

    def write(self, place: str, batch: pa.RecordBatch, number: int) -> NDArray[np.int64]:
        """Append the lists of the column `number`; (rows, 2): the first number of each and the one after its last."""
        import pyarrow as pa
        import pyarrow.compute as pc

        column = batch.column(number)
        if pa.types.is_null(column.type):
            return np.full((len(column), 2), self._written, dtype=np.int64)
        listed = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
        values = self._convert(column.flatten()) if listed else None
        if values is None:
            raise UserError(f"{place}: '{batch.schema.names[number]}' is {column.type}; expected lists of numbers.")
        self._file.write(values.tobytes())
        ends = self._written + np.cumsum(pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False))
        starts = np.concatenate([[self._written], ends[:-1]])
        self._written += len(values)
        return np.stack([starts, ends], axis=1).astype(np.int64)


def _token_ids(values: pa.Array) -> NDArray[np.int32] | None:
    import pyarrow as pa

    if pa.types.is_null(values.type):
        return np.full(len(values), -1, dtype=np.int32)
    if not pa.types.is_integer(values.type):
        return None
    numbers = values.cast(pa.int64(), safe=False).fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where((numbers < 0) | (numbers > np.iinfo(np.int32).max), -1, numbers).astype(np.int32)


def _log_probabilities(values: pa.Array) -> NDArray[np.float32] | None:
    import pyarrow as pa

    if pa.types.is_null(values.type):
        return np.full(len(values), np.nan, dtype=np.float32)
    if not (pa.types.is_floating(values.type) or pa.types.is_integer(values.type)):
        return None
    numbers = values.cast(pa.float64(), safe=False).fill_null(float("nan")).to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        return numbers.astype(np.float32)
