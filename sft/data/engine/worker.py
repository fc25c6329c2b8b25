"""The work on one shard, as a worker process does it: plain functions of a task that can be sent to another process."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from sft.data.engine.shards import ShardWriter, read_marker, read_records
from sft.data.read.outcomes import Dropped, Kept, Outcome, Replaced
from sft.data.read.record import Record
from sft.data.steps import RowStep, Step, TableStep, step_class
from sft.data.steps.context import Context

VERDICTS = "verdicts.parquet"


@dataclass(frozen=True)
class Task:
    """One shard of one step.

    `folder` is the step's; `input` the file that it reads, whose rows are of the source `source` (None: as they say);
    `number` is that of the shard, counted over all inputs, and `first_row` the number of its first row.
    """

    step: str
    config: Any
    context: Context
    folder: Path
    input: Path
    source: str | None
    number: int
    first_row: int


class Measure(RowStep):
    """Sets the length of every row. Not a step that a recipe names: the engine puts it where lengths are unknown."""

    def __call__(self, batch: list[Record]) -> Iterable[Outcome]:
        """Drops what the chat template can't render."""
        return self.context.measure(batch)


_current: tuple[tuple[Any, ...], Step] | None = None


def _step(task: Task) -> Step:
    """The step of a task. A process keeps it while the tasks are of the same step."""
    global _current
    key = (task.step, task.context)
    if _current is None or _current[0] != key:
        close_step()
        kind = Measure if task.step == "measure" else step_class(task.step)
        _current = (key, kind(task.config, task.context))
    return _current[1]


def close_step() -> None:
    """Close the step that this process keeps, if it keeps one."""
    global _current
    if _current is not None:
        (_, step), _current = _current, None
        step.close()


atexit.register(close_step)


def run_rows(task: Task) -> dict[str, Any]:
    """A RowStep over one shard; returns the shard's marker."""
    step = _step(task)
    assert isinstance(step, RowStep)

    def outcomes() -> Iterator[Outcome]:
        for batch in _groups(task):
            yield from _one_each(task.step, batch, step(batch))

    return _write_shard(task.folder, task.number, outcomes())


def _one_each(name: str, batch: list[Record], outcomes: Iterable[Outcome]) -> Iterator[Outcome]:
    count = 0
    for outcome in outcomes:
        count += 1
        yield outcome
    if count != len(batch):
        raise AssertionError(f"the step {name} answered {count} times for {len(batch)} rows")


def run_sketch(task: Task) -> dict[str, Any]:
    """What a TableStep has to know of one shard, written to `sketch-00000.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    started, step = time.monotonic(), _step(task)
    assert isinstance(step, TableStep)
    path = sketch_path(task.folder, task.number)
    if not path.is_file():
        temporary, writer, row = path.with_name(f".{path.name}.tmp"), None, task.first_row
        for batch in _batches(task):
            table = step.sketch(batch)
            table = table.add_column(0, "row", pa.array(range(row, row + len(batch)), pa.int64()))
            row += len(batch)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()
        os.replace(temporary, path)
    return {"seconds": time.monotonic() - started}


def _groups(task: Task) -> Iterator[list[Record]]:
    """The records of a task, group by group."""
    for batch in read_records(task.input):
        for record in batch:
            record.source = task.source or record.source
        yield batch


def _batches(task: Task) -> Iterator[list[Record]]:
    """The groups of a shard; one empty group where it has none, so that a sketch has its columns."""
    empty = True
    for batch in _groups(task):
        empty = False
        yield batch
    if empty:
        yield []


def sketch_path(folder: Path, number: int) -> Path:
    """Where the sketch of a shard is."""
    return folder / f"sketch-{number:05d}.parquet"


def run_apply(task: Task) -> dict[str, Any]:
    """What a TableStep decided, carried out on one shard; returns the shard's marker."""

    def outcomes() -> Iterator[Outcome]:
        row = task.first_row
        for batch in _groups(task):
            verdicts = _verdicts(task.folder / VERDICTS, row, row + len(batch))
            for record in batch:
                yield _carried_out(task.step, record, verdicts.get(row))
                row += 1

    return _write_shard(task.folder, task.number, outcomes())


def _verdicts(path: Path, first: int, end: int) -> dict[int, dict[str, Any]]:
    import pyarrow.parquet as pq

    # The file is sorted by row: the filter reads the few groups that hold these rows.
    table = pq.read_table(path, filters=[("row", ">=", first), ("row", "<", end)])
    return {verdict["row"]: verdict for verdict in table.to_pylist()}


def _carried_out(name: str, record: Record, verdict: dict[str, Any] | None) -> Outcome:
    if verdict is None:
        return Kept(record)
    if verdict["facts"]:
        record.facts[name] = json.loads(verdict["facts"])
    if verdict["copies"] == 0:
        return Dropped(record, verdict["reason"] or name, verdict["detail"] or "")
    if verdict["copies"] == 1:
        return Kept(record)
    return Replaced(record, [_copy(record, number) for number in range(1, verdict["copies"] + 1)])


def _copy(record: Record, number: int) -> Record:
    values = {name: getattr(record, name) for name in Record.__slots__}
    return Record(**{**values, "id": record.id if number == 1 else f"{record.id}#{number}"})


def _write_shard(folder: Path, number: int, outcomes: Iterable[Outcome]) -> dict[str, Any]:
    started = time.monotonic()
    with ShardWriter(folder, number) as writer:
        for outcome in outcomes:
            writer.add(outcome)
        return writer.finish(time.monotonic() - started)


@dataclass(frozen=True)
class ReadTask:
    """A source, read into shards of `rows` rows from its beginning."""

    outcomes: Callable[[], Iterator[Outcome]]
    folder: Path
    rows: int


def run_read(task: ReadTask, progress: Callable[[int], None]) -> list[dict[str, Any]]:
    """Read a source; shards that are whole already are passed over. Returns all markers, at least one."""
    rest, markers, rows = task.outcomes(), list[dict[str, Any]](), 0
    head = next(rest, None)
    while head is not None or not markers:
        chunk = islice(chain([] if head is None else [head], rest), task.rows)
        marker = read_marker(task.folder, len(markers))
        if marker is None:
            marker = _write_shard(task.folder, len(markers), chunk)
        elif sum(1 for _ in chunk) != marker["taken"]["rows"]:
            raise AssertionError(f"{task.folder}: the source has fewer rows than were read from it before")
        markers.append(marker)
        rows += marker["taken"]["rows"]
        progress(rows)
        head = next(rest, None)
    return markers
