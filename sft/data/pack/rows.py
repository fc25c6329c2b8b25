"""Documents to rows: which go where is decided at once, and the files are then written by several processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sft.data.pack.arrow import PackedRow, write_rows
from sft.data.pack.bins import pack
from sft.data.pack.documents import Documents

SHARD_TOKENS = 16_000_000  # 80 MB
ORDER, ENDS = ".order.npy", ".ends.npy"


@dataclass(frozen=True)
class RowsTask:
    """One file of rows: those from `first` to `end`, of the plan in `folder`.

    `top_k`: the most tokens that a teacher names at a place in any of the stage's documents; 0 without a teacher.
    """

    folder: Path
    number: int
    first: int
    end: int
    passes: Path
    documents: tuple[Path, ...]
    workers: int
    top_k: int = 0
    weighted: bool = False


def plan_rows(
    folder: Path, passes: Path, files: list[Path], capacity: int | None, workers: int, weighted: bool = False
) -> tuple[list[RowsTask], Documents]:
    """Decide the rows of the documents in `files`, and write the plan to `folder`.

    `capacity`: tokens that a packed row holds; None: each document is a row. `passes`: the folder with their tokens.
    `weighted`: they have weights.
    """
    documents = Documents(passes, files)
    lengths = documents.column("length")
    if capacity is None:
        order, ends = np.arange(len(lengths)), np.arange(1, len(lengths) + 1)
    else:
        bins = pack(lengths, capacity)
        order = np.concatenate([np.zeros(0, np.int64), *bins])
        ends = np.cumsum([len(found) for found in bins]).astype(np.int64)
    np.save(folder / ORDER, order)
    np.save(folder / ENDS, ends)
    borders = _borders(lengths[order].cumsum()[ends - 1] if len(ends) else ends)
    found = pairwise(borders)
    paths = tuple(files)
    top_k = int(documents.column("top_k").max(initial=0))
    common = (passes, paths, workers, top_k, weighted)
    tasks = [RowsTask(folder, n, first, end, *common) for n, (first, end) in enumerate(found)]
    return tasks, documents


def _borders(tokens: NDArray[np.int64]) -> list[int]:
    """Where each file of rows begins, and the last one's end; `tokens`: how many there are up to each row's end."""
    borders, rows = [0], len(tokens)
    while borders[-1] < rows:
        before = int(tokens[borders[-1] - 1]) if borders[-1] else 0
        end = int(np.searchsorted(tokens, before + SHARD_TOKENS, side="left")) + 1
        borders.append(min(end, rows))
    return borders if rows else [0, 0]


def run_rows(task: RowsTask) -> dict[str, Any]:
    """Write one file of rows; what the manifest says of it."""
    documents = Documents(task.passes, task.documents)
    order, ends = (np.load(task.folder / name, mmap_mode="r") for name in (ORDER, ENDS))

    def rows() -> Iterator[PackedRow]:
        for number in range(task.first, task.end):
            start = int(ends[number - 1]) if number else 0
            yield documents.take(order[start : int(ends[number])].tolist())

    return write_rows(task.folder / f"rows-{task.number:05d}.arrow", rows(), task.top_k, task.weighted)


def write_all(
    run: Callable[..., Iterator[tuple[RowsTask, dict[str, Any]]]],
    tasks: list[RowsTask],
    progress: Callable[[str, int, int | None], None],
) -> list[dict[str, Any]]:
    """Have every file of rows written by `run` (an engine's); what the manifest says of each, in order."""
    shards: dict[int, dict[str, Any]] = {}
    done = 0
    for task, shard in run(run_rows, tasks):
        shards[task.number] = shard
        done += shard["rows"]
        progress("packs", done, tasks[-1].end)
    for name in (ORDER, ENDS):
        (tasks[0].folder / name).unlink()
    return [shard for _, shard in sorted(shards.items())]
