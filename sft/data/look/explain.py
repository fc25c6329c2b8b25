"""One row's story: where each step put it aside, or what steps found out of it and where it is trained on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.look.find import rows_with, same_row

if TYPE_CHECKING:
    from rich.console import Console

    from sft.data.prepare import PreparedStage

SHOWN = 300
_COLUMNS = ["id", "place", "tokens", "facts", "step", "reason", "detail"]


def tell(prepared: PreparedStage, row_id: str, console: Console, title: str) -> bool:
    """Print what became of the row, and of the rows made from it; False when nobody knows it."""
    lines = list(story(prepared, row_id))
    if lines:
        console.print(title, style="bold", markup=False)
    for line in lines:
        console.print(line, markup=False)
    return bool(lines)


def story(prepared: PreparedStage, row_id: str) -> Iterator[str]:
    """A line for each thing that is known of the row, pass by pass."""
    from sft.utils.files import read_sealed

    for folder in prepared.passes:
        manifest = read_sealed(folder / "manifest.json") or {}
        titles = [node["title"] for node in manifest.get("nodes", ())]
        for path in sorted(folder.glob("kept-*.parquet")):
            for row in _rows(path, row_id):
                yield f"{row['id']} ({row.get('place', 'as before')}) goes on after {', '.join(titles)}{_facts(row)}"
        for path in sorted(folder.glob("aside-*.parquet")):
            for row in _rows(path, row_id):
                why = f"{row['reason']}: {row['detail'][:SHOWN]}"
                yield f"{row['step']}: {row['id']} ({row['place']}) {why}{_facts(row)}"
    for number in rows_with(prepared, row_id):
        row = prepared.dataset[number]
        for place, name in enumerate(row["document_ids"]):
            if same_row(name, row_id):
                yield f"trained: {name} is document {place} of row {number}, {row['seq_lengths'][place]} tokens"


def _rows(path: Path, row_id: str) -> list[dict[str, Any]]:
    """The row and those made from it, without their texts. Only the ids of the other rows are read."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
        found = []
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["id"])["id"]
            # A row that can't be read has no id but its place, which is the id then.
            mine = pc.or_(pc.equal(ids, row_id), pc.starts_with(ids, f"{row_id}#"))
            if pc.any(mine).as_py():
                found += file.read_row_group(group, columns=columns).filter(mine).to_pylist()
    return found


def _facts(row: dict[str, Any]) -> str:
    tokens = f", {row['tokens']} tokens" if row["tokens"] is not None else ""
    return tokens + (f", {row['facts'][:SHOWN]}" if row["facts"] != "{}" else "")
