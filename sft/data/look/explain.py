"""One row's story: what each step found out of it or changed, where it was put aside, and where it is trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import groupby, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.engine.plan import READ
from sft.data.look.find import rows_with, same_row
from sft.data.steps import FIT, TOKENIZE
from sft.data.steps.hold_out import HELD_OUT
from sft.data.store import MANIFEST_FILE
from sft.utils.files import read_sealed

if TYPE_CHECKING:
    from rich.console import Console

    from sft.data.prepare import PreparedStage

SHOWN = 300
_COLUMNS = ["id", "place", "tokens", "trained", "facts", "step", "reason", "detail"]


def tell(lines: Iterable[str], console: Console, title: str) -> bool:
    """Print a story under its title; False when there is none."""
    told = False
    for line in lines:
        if not told:
            console.print(title, style="bold", markup=False)
        console.print(line, markup=False, soft_wrap=True)
        told = True
    return told


def story(prepared: PreparedStage, row: str) -> Iterator[str]:
    """A line for each step that had to do with the row, and those made from it. `row`: its id, or its `file:line`."""
    names = {row}
    yield from story_so_far(prepared.passes, row, names)
    numbers = sorted({number for name in names for number in rows_with(prepared, name)})
    if numbers:
        yield from _last_pass(prepared.passes)
    for number in numbers:
        packed = prepared.dataset[number]
        for place, name in enumerate(packed["document_ids"]):
            if any(same_row(name, one) for one in names):
                yield f"trained: {name} is document {place} of row {number}, {packed['seq_lengths'][place]} tokens"


def _last_pass(passes: Sequence[Path]) -> Iterator[str]:
    """The pass that makes the rows to train on leaves nothing of those that come through, but what they are."""
    last = [_nodes(folder) for folder in passes if not any(folder.glob("kept-*.parquet"))]
    if len(last) == 1:  # of several, nobody knows which one it came through
        yield f"{', '.join(title for title, _ in last[0])}: it came through"


def _nodes(folder: Path) -> list[tuple[str, str]]:
    """Title and name of each step of a pass."""
    return [(node["title"], node["step"]) for node in (read_sealed(folder / MANIFEST_FILE) or {}).get("nodes", ())]


def story_so_far(passes: Sequence[Path], row: str, names: set[str] | None = None) -> Iterator[str]:
    """The story as far as the folders `passes` tell it, also of a preparation that failed. The row's ids join
    `names`."""
    names = {row} if names is None else names
    known: dict[str, _Known] = {}
    for folder in passes:
        nodes = _nodes(folder)
        for kind in ("aside", "kept"):
            for path in sorted(folder.glob(f"{kind}-*.parquet")):
                for found in _rows(path, row, names):
                    names.add(found["id"])
                    yield from _through(nodes, found, known)


@dataclass
class _Known:
    """What has been told of a row: it isn't told again."""

    place: str = ""
    tokens: int | None = None
    facts: dict[str, Any] = field(default_factory=dict)


def _through(nodes: Sequence[tuple[str, str]], row: dict[str, Any], known: dict[str, _Known]) -> Iterator[str]:
    """A row's way through the steps of one pass, up to the one that put it aside: what is new at each."""
    before = known.get(row["id"]) or _of_parent(row["id"], known)
    facts, place = json.loads(row["facts"]), row.get("place") or before.place
    who, last = f"{row['id']} ({place})", row.get("step")
    known[row["id"]] = _Known(place, row["tokens"], facts)
    reached = list(takewhile(lambda node: node[0] != last, nodes))
    told = [(title, _news(step, row, facts, before)) for title, step in reached]
    # Neighbouring steps that changed nothing share a line.
    for news, group in groupby(told, key=lambda one: one[1]):
        yield f"{', '.join(title for title, _ in group)}: {who} {news or 'goes on as it is'}"
    if last is not None:
        yield f"{last}: {who} {_ended(row)}"


def _ended(row: dict[str, Any]) -> str:
    if row["reason"] == HELD_OUT:
        return "is held out: its loss is taken, and it isn't trained"
    return f"{row['reason']}: {row['detail'][:SHOWN]}" if row["detail"] else str(row["reason"])


def _of_parent(name: str, known: dict[str, _Known]) -> _Known:
    """What is known of the row that this one was made from."""
    return next((found for other, found in known.items() if same_row(name, other)), _Known())


def _news(step: str, row: dict[str, Any], facts: dict[str, Any], before: _Known) -> str:
    if step == READ:
        return "is read"
    if step == TOKENIZE and row["tokens"] is not None and row["tokens"] != before.tokens:
        return f"has {row['tokens']} tokens, {row['trained']} of them trained"
    if step == FIT:
        return ""
    found = facts.get(step)
    if found is None or found == before.facts.get(step):
        return ""
    told = (f"{name} {value if isinstance(value, str) else json.dumps(value)}" for name, value in found.items())
    return ", ".join(told)[:SHOWN]


def _rows(path: Path, row: str, names: set[str]) -> list[dict[str, Any]]:
    """The row and those made from it, without their texts. Only ids and places of the other rows are read."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        by = [name for name in ("id", "place") if name in columns]
        found = []
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=by)
            tests = [pc.equal(table["id"], name) for name in names]
            tests += [pc.starts_with(table["id"], f"{name}#") for name in names]
            tests += [pc.equal(table["place"], one) for one in (row, row.rsplit("/", 1)[-1]) if "place" in by]
            mine = reduce(pc.or_, tests)
            if pc.any(mine).as_py():
                found += file.read_row_group(group, columns=columns).filter(mine).to_pylist()
    return found
