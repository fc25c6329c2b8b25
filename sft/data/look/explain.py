"""One row's story: what each step did with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.data.engine.builder import STEPS_FOLDER
from sft.data.engine.side_files import DROPPED_FILE, QUARANTINE_FILE

if TYPE_CHECKING:
    from rich.console import Console

    from sft.data.prepare import PreparedStage

SHOWN = 300


def tell(prepared: PreparedStage, row_id: str, console: Console, title: str) -> bool:
    """Print what became of the row, and of the rows made from it, in every step; False when nobody knows it."""
    lines = list(story(prepared, row_id))
    if lines:
        console.print(title, style="bold", markup=False)
    for line in lines:
        console.print(line, markup=False)
    return bool(lines)


def story(prepared: PreparedStage, row_id: str) -> Iterator[str]:
    """A line for each thing that happened to the row, in order."""
    steps = prepared.path.parent / STEPS_FOLDER
    for entry in prepared.manifest.get("steps", ()):
        folder = steps / entry["key"]
        for kind in ("kept", "dropped"):
            for path in sorted(folder.glob(f"{kind}-*.parquet")):
                for value in _rows(path, row_id):
                    yield f"{entry['title']}: {_said(kind, value)}"
    yield from _in_store(prepared, row_id)


def _rows(path: Path, row_id: str) -> list[dict[str, Any]]:
    """The row and those made from it, without their texts. Only the ids of the other rows are read."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    columns = ["id", "place", "tokens", "facts", "problem"]
    with pq.ParquetFile(path) as file:
        found = []
        for group in range(file.num_row_groups):
            ids = file.read_row_group(group, columns=["id"])["id"]
            mine = pc.or_(pc.equal(ids, row_id), pc.starts_with(ids, f"{row_id}#"))
            if pc.any(mine).as_py():
                wanted = [*columns, *(name for name in ("reason", "detail") if name in file.schema_arrow.names)]
                found += file.read_row_group(group, columns=wanted).filter(mine).to_pylist()
    return found


def _said(kind: str, value: dict[str, Any]) -> str:
    tokens = f", {value['tokens']} tokens" if value["tokens"] is not None else ""
    facts = f", {value['facts'][:SHOWN]}" if value["facts"] != "{}" else ""
    what = "goes on" if kind == "kept" else f"dropped: {value['reason']} ({value['detail'][:SHOWN]})"
    return f"{value['id']} ({value['place']}) {what}{tokens}{facts}"


def _in_store(prepared: PreparedStage, row_id: str) -> Iterator[str]:
    """Where the row is trained on, or why it is not, after the steps."""
    for number, row in enumerate(prepared.dataset.select_columns(["document_ids", "seq_lengths"])):
        for place, name in enumerate(row["document_ids"]):
            if name == row_id or name.startswith(f"{row_id}#"):
                yield f"trained: {name} is document {place} of row {number}, {row['seq_lengths'][place]} tokens"
    for file in (DROPPED_FILE, QUARANTINE_FILE):
        with open(prepared.path / file, encoding="utf-8") as handle:
            for line in handle:
                value = json.loads(line)
                if value.get("id") == row_id or str(value.get("id", "")).startswith(f"{row_id}#"):
                    yield f"packing: {value['id']} dropped: {value['reason']} ({value.get('tokens')} tokens)"
