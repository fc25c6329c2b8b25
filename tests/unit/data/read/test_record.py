"""Rows between steps."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.engine.shards import Counts
from sft.data.read.record import Record, fingerprint, from_table, to_table

texts = st.text(st.characters(codec="utf-8"), max_size=30)
json_values = st.recursive(st.none() | st.booleans() | st.integers() | texts, lambda inner: st.lists(inner, max_size=3))
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": texts, "content": texts}),
        st.fixed_dictionaries({"role": texts, "content": texts, "tools": texts}),
        st.fixed_dictionaries({"role": texts, "content": texts, "tool_calls": st.lists(json_values, min_size=1)}),
    ),
    max_size=3,
)
records = st.builds(
    Record,
    id=texts,
    source=texts,
    place=texts,
    problem=st.none() | texts,
    problem_id=texts,
    messages=st.none() | messages,
    answer=st.none() | texts,
    domain=st.none() | texts,
    tokens=st.none() | st.integers(0, 2**40),
    trained=st.none() | st.integers(0, 2**40),
    untrained=st.lists(st.integers(0, 9), max_size=2),
    tools=st.none() | texts,
    chat_template_kwargs=st.dictionaries(texts, json_values, max_size=2),
    carried=st.dictionaries(texts, json_values, max_size=2),
    facts=st.dictionaries(texts, json_values, max_size=2),
    teacher_ids=st.none() | st.lists(st.integers(0, 200_063), max_size=4),
    teacher_logprobs=st.none() | st.lists(st.floats(-50, 0, width=32), max_size=4),
)


@settings(deadline=None)
@given(st.lists(records, max_size=4))
def test_records_survive_the_table(rows: list[Record]) -> None:
    assert from_table(to_table(rows)) == rows


def checksum(rows: list[Record]) -> int:
    counts = Counts()
    for row in rows:
        counts.add(row)
    return counts.checksum


@given(st.lists(records, min_size=1, max_size=5), st.randoms())
def test_checksum_sees_a_lost_row_and_no_order(rows: list[Record], chance) -> None:  # type: ignore[no-untyped-def]
    shuffled = list(rows)
    chance.shuffle(shuffled)
    assert checksum(shuffled) == checksum(rows)
    assert checksum(rows[1:]) != checksum(rows)
    assert checksum([*rows, rows[0]]) != checksum(rows)


def test_half_surrogates_in_carried_columns_survive() -> None:
    (row,) = from_table(to_table([Record("a", "s", "p:1", carried={"raw": "half \ud83d"})]))
    assert row.carried == {"raw": "half \ud83d"}


def test_a_row_that_gets_another_id_is_another_row() -> None:
    """Its fingerprint is worked out once, and again when what it stands for has changed."""
    row = Record("a", "s", "p:1")
    first = fingerprint(row)
    assert fingerprint(row) == first == fingerprint(Record("a", "other", "p:1"))
    assert fingerprint(replace(row, id="a#2")) == fingerprint(Record("a#2", "s", "p:1")) != first
    row.place = "p:2"
    assert fingerprint(row) == fingerprint(Record("a", "s", "p:2")) != first
