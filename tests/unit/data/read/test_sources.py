"""Local files and generated problems: what is found, in which order, and what a broken row becomes."""

from __future__ import annotations

import gzip
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.read.local import columns_of, find_files, parse_line
from sft.data.read.row import characters_in, shortened
from sft.data.read.sources import open_source
from sft.recipe.schema import Source
from sft.utils.errors import UsageError, UserError


def _source(path: Any, **keys: Any) -> Source:
    return Source.model_validate({"path": str(path), **keys})


def _values(path: Any, **keys: Any) -> list[Any]:
    return [row.value for row in open_source(_source(path, **keys)).read()]


def test_lines_keep_their_numbers_and_broken_ones_are_marked(write_rows: Callable[..., Path]) -> None:
    path = write_rows([b"\xef\xbb\xbf" + b'{"a": 1}', "", '{"a": 2}\r', "{", "[1]", b"\xff", "1" * 5000, "[" * 100_000])
    rows = list(open_source(_source(path)).read())
    assert [(row.line, row.value) for row in rows[:2]] == [(1, {"a": 1}), (3, {"a": 2})]
    assert [row.bad.reason for row in rows[2:] if row.bad] == [
        "broken_json",
        "not_an_object",
        "broken_json",
        "broken_json",
        "broken_json",
    ]
    assert rows[2].raw == "{" and rows[4].raw == "\\xff"


@given(st.binary(max_size=40))
def test_any_line_is_a_row_or_bad(raw: bytes) -> None:
    row = parse_line("x", 1, raw)
    assert (row.value is None) == (row.bad is not None)


def test_jsonl_gz_and_parquet_hold_the_same_rows(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"a": i, "m": [{"role": "user", "content": str(i)}]} for i in range(3000)]
    path = write_rows(rows)
    with gzip.open(tmp_path / "packed.jsonl.gz", "wb") as handle:
        handle.write(path.read_bytes())
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "table.parquet")
    assert _values(path) == _values(tmp_path / "packed.jsonl.gz") == _values(tmp_path / "table.parquet") == rows
    assert _values(path, max_rows=2) == rows[:2]
    assert [row.line for row in open_source(_source(tmp_path / "table.parquet")).read()][-1] == 3000


def test_folder_is_read_in_order_of_names_without_hidden_files(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/a/z.jsonl", "d/.hidden.jsonl", "d/.git/c.jsonl", "d/readme.txt"):
        write_rows([{"from": name}], name)
    assert [value["from"] for value in _values(tmp_path / "d")] == ["d/a/z.jsonl", "d/b.jsonl"]
    assert [value["from"] for value in _values(tmp_path / "d" / "*.jsonl")] == ["d/b.jsonl"]
    assert [value["from"] for value in _values(tmp_path / "d" / "**" / "*.jsonl")] == ["d/a/z.jsonl", "d/b.jsonl"]


def test_splits_of_a_folder_are_never_mixed(write_rows: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("train.jsonl", "test.jsonl", "rollouts.jsonl"):
        write_rows([{"from": name}], f"d/{name}")
    assert _values(tmp_path / "d") == [{"from": "train.jsonl"}]
    assert _values(tmp_path / "d" / "*.jsonl", split="test") == [{"from": "test.jsonl"}]
    assert _values(tmp_path / "d" / "test.jsonl") == [{"from": "test.jsonl"}]
    assert _values(tmp_path / "d", split="validation") == [{"from": "rollouts.jsonl"}]
    (tmp_path / "d" / "rollouts.jsonl").unlink()
    with pytest.raises(UserError, match=r"no file belongs to the split 'validation' \(found test.jsonl, train.jsonl\)"):
        open_source(_source(tmp_path / "d", split="validation"))


@pytest.mark.parametrize(
    ("name", "said"),
    [("missing.jsonl", "no such file"), ("no/*.jsonl", "no .jsonl"), ("x.txt", "unknown kind"), ("empty", "no .jsonl")],
)
def test_what_is_not_there_is_said(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "x.txt").write_text("a,b\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=said):
        open_source(_source(tmp_path / name))


def test_broken_parquet_and_gzip_are_said(tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match="not a readable parquet file"):
        list(open_source(_source(tmp_path / "x.parquet")).read())
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(UserError, match="can't be read"):
        list(open_source(_source(tmp_path / "x.jsonl.gz")).read())


def test_neither_path_nor_id_is_said() -> None:
    with pytest.raises(UserError, match="neither a local path nor a Hub"):
        open_source(_source("what is this!"))


def test_a_file_that_grows_while_it_is_read_is_refused(write_rows: Callable[..., Path]) -> None:
    path = write_rows([{"a": 1}])
    opened = open_source(_source(path))
    with path.open("a") as handle:
        handle.write('{"a": 2}\n')
    with pytest.raises(UserError, match="changed while it was read"):
        list(opened.read())


def test_identity_follows_content_and_not_place(write_rows: Callable[..., Path]) -> None:
    first, second = write_rows([{"a": 1}], "one/rows.jsonl"), write_rows([{"a": 1}], "two/rows.jsonl")
    assert open_source(_source(first)).identity == open_source(_source(second)).identity
    write_rows([{"a": 2}], "two/rows.jsonl")
    assert open_source(_source(first)).identity != open_source(_source(second)).identity
    assert open_source(_source(first)).identity != open_source(_source(first, max_rows=1)).identity


def test_generated_problems_are_a_source() -> None:
    source = Source.model_validate({"generate": {"rows": 5, "seed": 3}})
    rows = list(open_source(source).read())
    assert [row.line for row in rows] == [1, 2, 3, 4, 5]
    assert all(row.value and row.value["prompt"] and row.value["completion"] for row in rows)
    again = Source.model_validate({"generate": {"rows": 5, "seed": 4}})
    assert open_source(source).identity != open_source(again).identity


def test_a_source_of_nothing_is_wrong_usage() -> None:
    with pytest.raises(UsageError, match="either"):
        open_source(Source.model_construct(path=None, generate=None))


def test_a_large_value_is_measured_and_quoted_without_a_copy() -> None:
    value = {"a": ["x" * 10_000_000, 3, None], "b": {"c": b"y" * 5_000_000}}
    tracemalloc.start()
    try:
        size, quoted = characters_in(value), str(shortened(value, 100))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert 15_000_000 < size < 15_000_100 and len(quoted) < 400 and peak < 1_000_000


def test_columns_are_seen_without_keeping_rows(write_rows: Callable[..., Path]) -> None:
    source = write_rows([{"prompt": "x" * 1_000_000, f"c{n}": n} for n in range(40)])
    files = find_files(str(source), "train")
    tracemalloc.start()
    try:
        columns = columns_of(files)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert columns == {"prompt", *(f"c{n}" for n in range(40))} and peak < 6_000_000
