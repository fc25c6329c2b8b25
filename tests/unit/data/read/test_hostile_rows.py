"""Files as people have them: each row is used or counted as bad for a reason, and only what is needed is read."""

from __future__ import annotations

import datetime
import json
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sft.data.look.find import put_aside
from sft.data.prepare import PreparedStage
from sft.data.read.local import find_files
from sft.data.read.sources import open_source
from sft.data.steps.decontaminate.step import read_benchmark
from sft.evaluate.suites import load_problems
from sft.recipe.schema import Source, SuiteSection
from sft.recipe.steps.decontaminate import Benchmark
from sft.utils.errors import UserError

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]

GOOD = {"prompt": "q", "completion": "a"}


def _reasons(prepared: PreparedStage) -> dict[str, int]:
    return dict(Counter(row["reason"].removeprefix("bad: ") for row in put_aside(prepared)))


def _unreadable(kind: str) -> pa.Array:
    """Two values that Python can't hold, or not as they say."""
    far = 10**18
    broken = pa.array([b"\xff", b"\xfe"]).view(pa.string())
    words = pa.array(["x", "y"]).dictionary_encode()
    return {
        "not UTF-8": broken,
        "not UTF-8 in a list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), broken),
        "not UTF-8 in a mapping": pa.StructArray.from_arrays([broken], ["x"]),
        "far timestamp": pa.array([far, far], pa.timestamp("us")),
        "far timestamp in a list": pa.array([[far], [far]], pa.list_(pa.timestamp("us"))),
        "far date": pa.array([10**7, 10**7], pa.date32()),
        "unknown time zone": pa.array([1, 2], pa.timestamp("us", tz="Mars/Phobos")),
        "far duration": pa.array([2**62, 2**62], pa.duration("s")),
        "dictionary in a list": pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), words),
    }[kind]


KINDS = [
    *("not UTF-8", "not UTF-8 in a list", "not UTF-8 in a mapping", "far timestamp", "far timestamp in a list"),
    *("far date", "unknown time zone", "far duration", "dictionary in a list"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_column_that_nobody_needs_is_not_read(prepare: Prepare, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table({"prompt": ["q", "r"], "completion": ["a", "b"], "note": _unreadable(kind)})
    pq.write_table(table, path, row_group_size=1)
    assert prepare(path).manifest["documents"] == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_that_cant_be_read_makes_its_row_bad_and_no_other(prepare: Prepare, tmp_path: Path, kind: str) -> None:
    note = _unreadable(kind)
    good = pa.array([None], note.type)
    chunks = pa.chunked_array([note, good]) if kind != "dictionary in a list" else pa.chunked_array([note])
    words = ["q", "r", "s"][: len(chunks)]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": words, "completion": words, "note": chunks}), path)
    prepared = prepare([{"path": str(path), "carry": ["note"]}], max_bad_fraction=1.0)
    if kind == "dictionary in a list":
        assert prepared.manifest["documents"] == 2
        return
    assert prepared.manifest["documents"] == 1
    assert _reasons(prepared) == {"invalid_unicode" if "UTF-8" in kind else "unreadable_value": 2}
    assert all("'note' can't be read" in row["detail"] for row in put_aside(prepared))


@pytest.mark.parametrize("name", ["bad_extra", "dictionary", "far_date"])
def test_files_that_ended_a_run(prepare: Prepare, shared_dir: Path, name: str) -> None:
    path = shared_dir / "cases" / "rows" / f"{name}.parquet"
    if not path.is_file():
        pytest.skip(f"there is no {path}")
    assert prepare(path).manifest["documents"] == pq.ParquetFile(path).metadata.num_rows


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (3, "wrong_type"),
        (b"x", "wrong_type"),
        (Decimal("1.5"), "wrong_type"),
        (datetime.date(2020, 1, 1), "wrong_type"),
        (datetime.timedelta(1), "wrong_type"),
        (True, "wrong_type"),
        ([1.5], "wrong_type"),
        ({"x": "y"}, "missing_key"),
        ([{"role": "user", "content": "x"}], "no_assistant_turn"),
        ([{"role": "assistant", "content": None}], "missing_key"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}], "tool_calls"),
        (None, "null_value"),
        (" ", "empty_answer"),
    ],
)
def test_a_parquet_column_of_another_kind_is_bad_rows(
    prepare: Prepare, tmp_path: Path, write_rows: Write, value: Any, reason: str
) -> None:
    folder = tmp_path / "d"
    write_rows([GOOD], "d/good.jsonl")
    pq.write_table(pa.Table.from_pylist([{"prompt": "q", "completion": value}]), folder / "bad.parquet")
    prepared = prepare(folder, max_bad_fraction=1.0)
    assert prepared.manifest["documents"] == 1 and _reasons(prepared) == {reason: 1}


def test_a_file_without_the_needed_columns_is_bad_rows(prepare: Prepare, tmp_path: Path, write_rows: Write) -> None:
    write_rows([GOOD], "d/a.jsonl")
    pq.write_table(pa.table({"x": [1, 2, 3]}), tmp_path / "d" / "b.parquet")
    prepared = prepare(tmp_path / "d", max_bad_fraction=1.0)
    assert prepared.manifest["documents"] == 1 and _reasons(prepared) == {"missing_key": 3}


def test_hostile_lines_are_counted(prepare: Prepare, write_rows: Write) -> None:
    deep = [f'{{"prompt": "q", "completion": "a", "tools": {"[" * n}{"]" * n}}}' for n in (120, 500, 980, 990, 5000)]
    call = '{"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "function_call": %s}]}'
    lines: list[tuple[Any, str]] = [
        *((line, "broken_json") for line in deep),
        (call % ('{"name": "f", "arguments": {"x": ' + "[" * 300 + "]" * 300 + "}}"), "broken_json"),
        (call % '{"name": "f", "arguments": {"x": NaN}}', "wrong_type"),
        (call % '{"name": "f"}', "tool_calls"),
        ('{"prompt": "q", "completion": 1' + "0" * 5000 + "}", "broken_json"),
        ('{"prompt": "q", "prompt": "r", "completion": null}', "null_value"),
        ({"prompt": "q", "completion": "a", "tools": "\udc00"}, "wrong_type"),
        ({"prompt": "q", "completion": "a", "tools": [{"name": "\udc00"}]}, "invalid_unicode"),
        ({"prompt": "q", "completion": "a", "system": ["x"]}, "wrong_type"),
        ({"prompt": "q", "completion": "a", "chat_template_kwargs": 5}, "wrong_type"),
        ({"prompt": "q", "completion": [{"role": "assistant", "content": "a", "weight": []}]}, "wrong_type"),
        ({"prompt": {"role": {}, "content": "x"}, "completion": "a"}, "unknown_role"),
        (b'{"prompt": "\xff", "completion": "a"}', "broken_json"),
    ]
    prepared = prepare(write_rows([GOOD, *(line for line, _ in lines)]), max_bad_fraction=1.0)
    assert prepared.manifest["documents"] == 1
    found = {row["place"]: row["reason"].removeprefix("bad: ") for row in put_aside(prepared)}
    assert found == {f"rows.jsonl:{n}": reason for n, (_, reason) in enumerate(lines, start=2)}


CSV = (
    b"\xef\xbb\xbfid,prompt,completion,note\r\n"
    b'1,"q, or ""q""","a\nb",x\r\n'
    b"\r\n"
    b"2,only\r\n"
    b"3,q,a,x,more\r\n"
    b'4,"q"q,a,x\r\n'
    b"5,q\xff,a,x\r\n"
    b"6,q,a,\xff\r\n"
    b"7,,a,x\r\n"
)


def test_csv_rows_are_used_or_counted(prepare: Prepare, tmp_path: Path, toy: Any) -> None:
    (tmp_path / "rows.csv").write_bytes(CSV)
    prepared = prepare(tmp_path / "rows.csv", max_bad_fraction=1.0)
    texts = {row["document_ids"][0]: toy.decode(row["input_ids"]) for row in prepared.dataset}
    said = '<|user|>q, or "q"<|end|><|assistant|>a\nb<|end|><|endoftext|>'
    assert texts == {"1": said, "6": "<|user|>q<|end|><|assistant|>a<|end|><|endoftext|>"}
    bad = {row["place"]: (row["reason"], json.loads(row["carried"])["raw"]) for row in put_aside(prepared)}
    assert bad["rows.csv:5"] == ("bad: broken_csv", "2,only") and bad["rows.csv:6"][0] == "bad: broken_csv"
    assert bad["rows.csv:7"] == ("bad: broken_csv", '4,"q"q,a,x')
    assert bad["rows.csv:8"][0] == "bad: invalid_unicode" and bad["rows.csv:10"][0] == "bad: empty_prompt"


@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_parts_of_csv_and_json_are_the_whole(tmp_path: Path, size: int) -> None:
    rows = [{"prompt": f'{i}, "x"\nmore', "completion": "\u00e9" * i, "n": str(i)} for i in range(7)]
    lines = [",".join('"' + value.replace('"', '""') + '"' for value in row.values()) for row in rows]
    (tmp_path / "rows.csv").write_text("\n".join(["prompt,completion,n", *lines, ""]), "utf-8")
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=2), "utf-8")
    (tmp_path / "lines.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    for name in ("rows.csv", "list.json", "lines.json"):
        opened = open_source(Source(path=str(tmp_path / name)))
        parts = opened.parts(size, tmp_path / f"spool-{name}", opened.columns())
        assert [part.rows for part in parts] == [min(size, 7 - start) for start in range(0, 7, size)]
        whole = list(opened.read())
        assert [row for part in parts for row in part.read()] == whole
        assert [row.value for row in whole] == rows and opened.columns() == {"prompt", "completion", "n"}


def test_a_json_list_has_good_and_bad_rows(prepare: Prepare, write_rows: Write) -> None:
    rows = [
        json.dumps([GOOD, 3, None, [], {"prompt": "q"}]).encode()[:-1] + b', {"prompt": "q\xff", "completion": "a"}]'
    ]
    prepared = prepare(write_rows(rows, "rows.json"), max_bad_fraction=1.0)
    assert prepared.manifest["documents"] == 1
    assert _reasons(prepared) == {"not_an_object": 3, "missing_key": 1, "invalid_unicode": 1}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.csv", 'prompt,completion\nq,a\nr,"b\ns,c\n', r"the row in line 3 has a quote that is never closed"),
        ("x.csv", "prompt,prompt\nq,a\n", "must name its columns"),
        ("x.csv", "", "no row in it"),
        ("x.json", '[{"prompt": "q", "completion": "a"},\n {"prompt"', "not readable JSON at line 2"),
        ("x.json", '[{"prompt": "q"}] x', "something follows the list"),
        ("x.json", '[{"prompt": "q"} {"prompt": "q"}]', "expected a comma"),
        ("x.json", '{"data": [\n{"prompt": "q", "completion": "a"}\n]}', "holds one JSON object"),
        ("x.json", "[" * 100_000, "not readable JSON"),
        ("x.json", "[]", "no row in it"),
    ],
)
def test_files_whose_rows_cant_be_told_apart_are_one_sentence(
    prepare: Prepare, tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=said) as caught:
        prepare(tmp_path / name, max_bad_fraction=1.0)
    assert name in str(caught.value)


def test_side_files_of_a_folder_are_data_only_where_they_are_named_or_alone(write_rows: Write, tmp_path: Path) -> None:
    for name in ("d/rows.jsonl", "d/dataset_info.json", "d/results.csv", "e/rows.json"):
        write_rows(["[]"], name)
    folder = str(tmp_path / "d")
    assert [name for name, _ in find_files(folder, "train")] == ["rows.jsonl"]
    assert [name for name, _ in find_files(f"{folder}/*", "train")] == ["rows.jsonl"]
    assert [name for name, _ in find_files(f"{folder}/*.csv", "train")] == ["results.csv"]
    assert [name for name, _ in find_files(folder, "train", "*.json")] == ["dataset_info.json"]
    assert [name for name, _ in find_files(str(tmp_path / "e"), "train")] == ["rows.json"]


def test_nulls_that_fill_up_mappings_are_no_values(tmp_path: Path) -> None:
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": [{"z": 2}, {"w": None}]}}]
    pq.write_table(pa.Table.from_pylist([{"calls": calls, "empty": None}]), tmp_path / "rows.parquet")
    (row,) = open_source(Source(path=str(tmp_path / "rows.parquet"))).read()
    calls[1]["arguments"] = {"y": [{"z": 2}, {}]}
    assert row.value == {"calls": calls, "empty": None}


def test_suites_and_benchmarks_read_only_what_they_need(tmp_path: Path) -> None:
    note = _unreadable("not UTF-8")
    path = str(tmp_path / "rows.parquet")
    pq.write_table(pa.table({"problem": ["1+1?", "one and two?"], "answer": ["2", "3"], "note": note}), path)
    suite = SuiteSection.model_validate({"name": "s", "source": {"path": path}})
    assert [problem.gold for problem in load_problems(suite)] == ["2", "3"]
    assert len(read_benchmark(Benchmark.model_validate({"name": "b", "path": path}))) == 2
