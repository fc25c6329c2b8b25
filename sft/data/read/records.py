"""From a source's rows to records: which column is what, and what can't be used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import row_id, to_messages, to_problem
from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record, text_hash
from sft.data.read.row import BadRow, Row, peek
from sft.data.read.sources import OpenSource, source_name
from sft.recipe.schema import DataSource, Templates
from sft.utils.errors import UserError

BAD = "bad: "


def read_outcomes(opened: OpenSource, source: DataSource, templates: Templates) -> Iterator[Outcome]:
    """Every row of a source as a record; those that can't be used are dropped for a reason that begins with `BAD`.

    Raises UserError when the source has no known columns, or lacks one that it should carry.
    """
    rows, names = peek(opened.read())
    mapping = None if names is None else _mapping(names, opened.name, source)
    for row in rows:
        yield _outcome(row, mapping, source, templates)


def _mapping(names: set[str], name: str, source: DataSource) -> ColumnMap:
    """Which of the columns `names` of the source called `name` is what."""
    missing = [column for column in source.carry if column not in names]
    if missing:
        listed = ", ".join(sorted(names)[:20])
        raise UserError(f"{name}: `carry` names a column '{missing[0]}' that isn't there; it has: {listed}.")
    given: Any = source.columns
    return choose_columns(name, names, given, problems=source.rows == "problems")


def _outcome(row: Row, mapping: ColumnMap | None, source: DataSource, templates: Templates) -> Outcome:
    name = source_name(source)
    if row.value is None or mapping is None:
        record = Record(f"{row.source}:{row.line}", name, f"{row.source}:{row.line}", carried={"raw": row.raw})
        bad = row.bad or BadRow("broken_json", "unreadable")
        return Dropped(record, BAD + bad.reason, bad.detail)
    record = Record(
        id=row_id(row.value, mapping, row.source, row.line),
        source=name,
        place=f"{row.source}:{row.line}",
        answer=_plain(row.value, mapping.answer),
        domain=_plain(row.value, mapping.domain),
        carried={column: row.value.get(column) for column in source.carry},
    )
    filled = to_problem(row.value, mapping) if source.rows == "problems" else to_messages(row.value, mapping, templates)
    if isinstance(filled, BadRow):
        record.carried = {"raw": {key: value for key, value in row.value.items() if value is not None}}
        return Dropped(record, BAD + filled.reason, filled.detail)
    if isinstance(filled, str):
        record.problem = filled
    else:
        record.messages = filled
        record.problem = _problem(row.value, mapping, record)
    record.problem_id = f"{text_hash(f'{name} {(record.problem or record.id).strip()}'):032x}"
    return Kept(record)


def _plain(value: Mapping[str, Any], column: str | None) -> str | None:
    """A column's value as text; None where it is null or there is no such column."""
    found = value.get(column) if column is not None else None
    return None if found is None else str(found)


def _problem(value: Mapping[str, Any], mapping: ColumnMap, record: Record) -> str | None:
    """The question without templates: the prompt's column, or what the user says first."""
    if mapping.messages is None and mapping.prompt is not None:
        return str(value[mapping.prompt])
    return next((message["content"] for message in record.messages or [] if message["role"] == "user"), None)
