"""The work on one shard, as a worker process does it: plain functions of a task that can be sent to another process."""

from __future__ import annotations

import atexit
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft.data.engine.shards import (
    GROUP_CHARACTERS,
    GROUP_ROWS,
    Account,
    Groups,
    ShardWriter,
    kept_path,
    read_records,
    size_of,
)
from sft.data.pack.documents import DocumentsWriter, documents_path
from sft.data.pack.tokens import TokensWriter
from sft.data.read.outcomes import Dropped, Kept, Outcome, Replaced
from sft.data.read.record import Record, thin_schema
from sft.data.read.records import Reading
from sft.data.read.row import Part
from sft.data.steps import RowStep, Step, TableStep, step_class
from sft.data.steps.context import Context
from sft.data.steps.fit import Fit
from sft.data.steps.tokenize import Tokenize

VERDICTS = "verdicts.parquet"
SHARD_BITS = 32
"""A row's number is that of its shard, and in these bits its place there."""

Act = Callable[[list[Record]], Iterable[Outcome]]


@dataclass(frozen=True)
class StepTask:
    """One step of a pass. `rename`: what the rows' source is called from here on (None: as they say)."""

    name: str
    title: str
    config: Any
    context: Context
    rename: str | None = None


@dataclass(frozen=True)
class Input:
    """Where a shard's rows come from: a file of records, or a part of a source and how it is read.

    `texts`: the file with the rows themselves, where `path` only says which of them go on. `rename`: what the rows'
    source is called (None: as they say).
    """

    path: Path | None = None
    texts: Path | None = None
    rename: str | None = None
    part: Part | None = None
    reading: Reading | None = None
    title: str = ""

    def groups(self) -> Iterator[list[Record]]:
        """The records of a file, group by group."""
        assert self.path is not None
        for batch in read_records(self.path, self.texts):
            for record in batch:
                record.source = self.rename or record.source
            yield batch


@dataclass(frozen=True)
class Task:
    """One shard of one pass, whose folder is `folder`; `number` is that of the shard, counted over all inputs.

    `decides`: the first step is a TableStep, whose verdicts lie in the folder. `documents`: the pass makes documents;
    `only_judges`: its shards say which rows go on, and no more.
    """

    folder: Path
    number: int
    input: Input
    steps: tuple[StepTask, ...]
    workers: int
    decides: bool = False
    documents: bool = False
    only_judges: bool = False


_current: tuple[Any, list[Step]] | None = None


def _steps(task: Task) -> list[Step]:
    """The steps of a task. A process keeps them while the tasks are of the same pass."""
    global _current
    key = (task.folder, [(step.name, step.context) for step in task.steps])
    if _current is None or _current[0] != key:
        close_steps()
        _current = (key, [step_class(step.name)(step.config, step.context) for step in task.steps])
    return _current[1]


def close_steps() -> None:
    """Close the steps that this process keeps, if it keeps any."""
    global _current
    if _current is not None:
        (_, steps), _current = _current, None
        for step in steps:
            step.close()


atexit.register(close_steps)


def run_pass(task: Task) -> dict[str, Any]:
    """All steps of a pass over one shard; returns the shard's marker."""
    reads = task.input.part is not None
    titles = [*([task.input.title] if reads else []), *(step.title for step in task.steps)]
    target: Any = None
    if task.documents:
        target = DocumentsWriter(documents_path(task.folder, task.number))
    elif task.only_judges:
        target = Groups(kept_path(task.folder, task.number), thin_schema())
    with ShardWriter(task.folder, task.number, titles, target) as writer:
        accounts = iter(writer.accounts)
        groups = _read(task.input, next(accounts)) if reads else task.input.groups()
        for place, (asked, step, account) in enumerate(zip(task.steps, _steps(task), accounts, strict=True)):
            act = _verdicts(task, asked.name) if task.decides and place == 0 else _act(task, place, step, writer)
            groups = _through(asked, act, groups, account)
        for group in groups:
            for record in group:
                writer.add(record)
        return writer.finish()


def begin(tasks: Sequence[Task]) -> None:
    """Let the steps that one process works on begin what takes long, with the rows of all shards at hand."""
    first = _steps(tasks[0])[0]
    assert isinstance(first, RowStep)
    first.ahead(batch for task in tasks for batch in task.input.groups())


def _act(task: Task, place: int, step: Step, writer: ShardWriter) -> Act:
    """The step, made ready for this shard."""
    assert isinstance(step, RowStep)
    if isinstance(step, Tokenize):
        path = task.folder / f"tokens-{task.number:05d}-{place}.arrow"
        step.sink = TokensWriter(path, weighted=step.config.weights is not None)
        writer.files.append(step.sink)
    if isinstance(step, Fit):
        step.passes = task.folder.parent
    return step


def _read(given: Input, account: Account) -> Iterator[list[Record]]:
    """The rows of a source's part as records, group by group."""
    assert given.part is not None and given.reading is not None
    group: list[Record] = []
    characters, started = 0, time.monotonic()
    for row in given.part.read():
        for record in account.add(given.reading.outcome(row)):
            group.append(record)
            characters += size_of(record)
        del row  # with columns that nobody needs, which may be large
        if len(group) >= GROUP_ROWS or characters >= GROUP_CHARACTERS:
            account.seconds += time.monotonic() - started
            yield group
            group, characters, started = [], 0, time.monotonic()
    account.seconds += time.monotonic() - started
    if group:
        yield group


def _through(asked: StepTask, act: Act, groups: Iterator[list[Record]], account: Account) -> Iterator[list[Record]]:
    """What a step lets go on, in groups that fit into memory."""
    for batch in groups:
        started, count = time.monotonic(), 0
        kept: list[Record] = []
        for record in batch:
            record.source = asked.rename or record.source
        for outcome in act(batch):
            count += 1
            kept += account.add(outcome)
        if count != len(batch):
            raise AssertionError(f"the step {asked.name} answered {count} times for {len(batch)} rows")
        account.seconds += time.monotonic() - started
        # Only a step that makes rows can make a group too large.
        yield from [kept] if 0 < len(kept) <= len(batch) else _regrouped(kept)


def _regrouped(records: list[Record]) -> Iterator[list[Record]]:
    group: list[Record] = []
    characters = 0
    for record in records:
        group.append(record)
        characters += size_of(record)
        if len(group) >= GROUP_ROWS or characters >= GROUP_CHARACTERS:
            yield group
            group, characters = [], 0
    if group:
        yield group


# ---- a step that sees all rows ----


def run_sketch(task: Task) -> dict[str, Any]:
    """What a TableStep has to know of one shard, written to `sketch-00000.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    step = _steps(task)[0]
    assert isinstance(step, TableStep)
    path = sketch_path(task.folder, task.number)
    if not path.is_file():
        temporary, writer, row = path.with_name(f".{path.name}.tmp"), None, task.number << SHARD_BITS
        for batch in _at_least_one(task.input.groups()):
            table = step.sketch(batch)
            table = table.add_column(0, "row", pa.array(range(row, row + len(batch)), pa.int64()))
            row += len(batch)
            writer = writer or pq.ParquetWriter(temporary, table.schema, compression="zstd")
            writer.write_table(table)
        assert writer is not None
        writer.close()
        os.replace(temporary, path)
    return {}


def _at_least_one(groups: Iterator[list[Record]]) -> Iterator[list[Record]]:
    """The groups of a shard; one empty group where it has none, so that a sketch has its columns."""
    empty = True
    for batch in groups:
        empty = False
        yield batch
    if empty:
        yield []


def sketch_path(folder: Path, number: int) -> Path:
    """Where the sketch of a shard is."""
    return folder / f"sketch-{number:05d}.parquet"


def _verdicts(task: Task, name: str) -> Act:
    """What a TableStep decided, carried out on the rows of one shard, which come in their order."""
    import pyarrow.parquet as pq

    row = task.number << SHARD_BITS

    def act(batch: list[Record]) -> Iterator[Outcome]:
        nonlocal row
        first, row = row, row + len(batch)
        # The file is sorted by row: the filter reads the few groups that hold these rows.
        table = pq.read_table(task.folder / VERDICTS, filters=[("row", ">=", first), ("row", "<", row)])
        verdicts = {verdict["row"]: verdict for verdict in table.to_pylist()}
        for number, record in enumerate(batch, start=first):
            yield _carried_out(name, record, verdicts.get(number))

    return act


def _carried_out(name: str, record: Record, verdict: dict[str, Any] | None) -> Outcome:
    if verdict is None:
        return Kept(record)
    if verdict["facts"]:
        record.facts[name] = json.loads(verdict["facts"])
    if verdict["copies"] == 0:
        return Dropped(record, verdict["reason"] or name, verdict["detail"] or "")
    if verdict["copies"] == 1:
        return Kept(record)
    ids = [f"{record.id}#{number}" for number in range(2, verdict["copies"] + 1)]
    return Replaced(record, [record, *(replace(record, id=copy, facts=dict(record.facts)) for copy in ids)])
