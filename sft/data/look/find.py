"""Finding rows and documents in a prepared stage."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

from sft.data.engine.side_files import DROPPED_FILE, QUARANTINE_FILE, TRUNCATED_FILE, read_side_file
from sft.data.prepare import PreparedStage
from sft.utils.errors import UserError

EXAMPLES = 3  # of each reason
EXCERPT = 200


def check_row(prepared: PreparedStage, number: int) -> int:
    """`number`, when the stage has such a row. Raises UserError."""
    if number >= len(prepared.dataset):
        raise UserError(f"There is no row {number}: the stage's {len(prepared.dataset)} rows are counted from 0.")
    return number


def rows_with(prepared: PreparedStage, row_id: str) -> list[int]:
    """Numbers of the rows that hold the document `row_id`, or one that was made from it (`row_id#...`)."""
    import pyarrow.compute as pc

    found, start = [], 0
    for chunk in prepared.dataset.data.column("document_ids").chunks:
        names = chunk.flatten()
        mine = pc.or_(pc.equal(names, row_id), pc.starts_with(names, f"{row_id}#"))
        found += [start + parent for parent in pc.list_parent_indices(chunk).filter(mine).unique().to_pylist()]
        start += len(chunk)
    return found


def same_row(name: str, row_id: str) -> bool:
    """Whether the document `name` is the row `row_id`, or was made from it."""
    return name == row_id or name.startswith(f"{row_id}#")


def cut_lengths(prepared: PreparedStage, rows: Iterable[dict[str, Any]]) -> dict[tuple[str, int], int]:
    """Of the documents of `rows` that were cut at max_length: (id, length) -> whole length in tokens."""
    limit = prepared.manifest["recipe"]["max_length"]
    # Only a document that fills max_length can be one that was cut.
    full = {
        name
        for row in rows
        for name, length in zip(row["document_ids"], row["seq_lengths"], strict=True)
        if length == limit
    }
    if not full:
        return {}
    lines = read_side_file(prepared.path / TRUNCATED_FILE)
    return {(line["id"], limit): line["tokens"] for line in lines if line["id"] in full}


def first_cut(prepared: PreparedStage, limit: int) -> list[tuple[str, int]]:
    """(id, whole length in tokens) of the first `limit` documents that were cut at max_length."""
    lines = islice(read_side_file(prepared.path / TRUNCATED_FILE), limit)
    return [(line["id"], line["tokens"]) for line in lines]


def dropped_examples(prepared: PreparedStage, reasons: Iterable[str]) -> dict[str, list[dict[str, str]]]:
    """Some rows of each reason for which rows were dropped after the data's steps, as `FunnelLine.examples`."""
    found: dict[str, list[dict[str, str]]] = {reason: [] for reason in reasons}
    for line in read_side_file(prepared.path / DROPPED_FILE):
        _add(found, line["reason"], line["id"], f"{line['tokens']} tokens", f"{line['source']}:{line['line']}")
        if all(len(rows) == EXAMPLES for rows in found.values()):
            break
    for line in read_side_file(prepared.path / QUARANTINE_FILE):
        _add(found, f"bad: {line['reason']}", f"{line['source']}:{line['line']}", line["detail"], str(line["row"]))
        if all(len(rows) == EXAMPLES for rows in found.values()):
            break
    return {reason: rows for reason, rows in found.items() if rows}


def _add(found: dict[str, list[dict[str, str]]], reason: str, row_id: str, detail: str, text: str) -> None:
    rows = found.get(reason)
    if rows is not None and len(rows) < EXAMPLES:
        rows.append({"id": row_id, "detail": detail[:EXCERPT], "text": " ".join(text.split())[:EXCERPT]})
