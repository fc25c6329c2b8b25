"""From a source's rows to records: which column is what, and what can't be used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sft.data.read.columns import ColumnMap, choose_columns
from sft.data.read.conversation import question, row_id, to_extras, to_messages, to_problem
from sft.data.read.message import context_only
from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record, text_hash
from sft.data.read.row import BadRow, Row
from sft.data.read.sources import OpenSource
from sft.recipe.schema import DataSource, Templates
from sft.utils.errors import UserError

BAD = "bad: "


@dataclass(frozen=True)
class Reading:
    """How the rows of a source become records. `mapping` is None where its first rows can't be read at all.

    `name`: what their source is called; `before`: what is put before their places, to tell the files of sources apart;
    `unread`: columns that the first rows have and nobody needs.
    """

    source: DataSource
    templates: Templates
    mapping: ColumnMap | None
    name: str
    before: str = ""
    unread: tuple[str, ...] = ()

    @property
    def columns(self) -> set[str] | None:
        """Every column that is needed; None where it isn't known which are."""
        return None if self.mapping is None else self.mapping.needed() | set(self.source.carry)

    def outcome(self, row: Row) -> Kept | Dropped:
        """The row as a record; one that can't be used is dropped for a reason that begins with `BAD`."""
        return _outcome(row, self)


def how_to_read(opened: OpenSource, source: DataSource, templates: Templates, name: str, before: str = "") -> Reading:
    """Which column is what, seen from the source's first readable rows.

    Raises UserError when the source has no known columns, or lacks one that it should carry.
    """
    names = opened.columns()
    mapping = None if names is None else columns_taken(names, opened.name, source)
    reading = Reading(source, templates, mapping, name, before)
    return replace(reading, unread=tuple(sorted((names or set()) - (reading.columns or set()))))


def weights_column(names: set[str] | None, name: str, column: str | None) -> str | None:
    """The column with the loss's weights. Raises UserError where the source called `name` has no such one."""
    if column is not None and names is not None and column not in names:
        listed = ", ".join(sorted(names)[:20])
        raise UserError(f"{name}: `train.loss.weights` names a column '{column}' that isn't there; it has: {listed}.")
    return column


def columns_taken(names: set[str], name: str, source: DataSource) -> ColumnMap:
    """Which of the columns `names` of the source called `name` is what.

    Raises UserError when none is known, or one that the recipe names isn't there.
    """
    missing = [column for column in source.carry if column not in names]
    if missing:
        listed = ", ".join(sorted(names)[:20])
        raise UserError(f"{name}: `carry` names a column '{missing[0]}' that isn't there; it has: {listed}.")
    given: Any = source.columns
    return choose_columns(name, names, given, problems=source.rows == "problems")


def _outcome(row: Row, reading: Reading) -> Kept | Dropped:
    source, mapping, name, file = reading.source, reading.mapping, reading.name, f"{reading.before}{row.source}"
    place = f"{file}:{row.line}"
    if row.value is None or mapping is None:
        record = Record(place, name, place, carried={"raw": row.raw})
        bad = row.bad or BadRow("broken_json", "unreadable")
        return Dropped(record, BAD + bad.reason, bad.detail)
    record = Record(
        id=row_id(row.value, mapping, file, row.line),
        source=name,
        place=place,
        answer=_plain(row.value, mapping.answer),
        domain=_plain(row.value, mapping.domain),
        carried={column: row.value.get(column) for column in source.carry},
    )
    problems = source.rows == "problems"
    filled = to_problem(row.value, mapping) if problems else to_messages(row.value, mapping, reading.templates)
    extras = to_extras(row.value, mapping)
    if isinstance(filled, BadRow) or isinstance(extras, BadRow):
        bad = next(found for found in (filled, extras) if isinstance(found, BadRow))
        record.carried = {"raw": {key: value for key, value in row.value.items() if value is not None}}
        return Dropped(record, BAD + bad.reason, bad.detail)
    record.tools, record.chat_template_kwargs = extras
    if isinstance(filled, str):
        record.problem = filled
    else:
        record.messages, record.untrained = filled, context_only(filled)
        record.problem = _problem(row.value, mapping, record)
    record.problem_id = f"{text_hash(f'{name} {(record.problem or record.id).strip()}'):032x}"
    return Kept(record)


def _plain(value: Mapping[str, Any], column: str | None) -> str | None:
    """A column's value as text; None where it is null or there is no such column. Half a surrogate pair is written as
    an escape: no file of rows can hold it."""
    found = value.get(column) if column is not None else None
    return None if found is None else str(found).encode("utf-8", "backslashreplace").decode("utf-8")


def _problem(value: Mapping[str, Any], mapping: ColumnMap, record: Record) -> str | None:
    """The question without templates: the prompt's column, or what the user says first."""
    asked = question(value, mapping)
    if asked is not None:
        return asked
    return next((message["content"] for message in record.messages or [] if message["role"] == "user"), None)
