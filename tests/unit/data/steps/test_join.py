"""The step `join`: what it finds in another set, and its index under several processes and a kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from children import read_line
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped, Kept, Outcome
from sft.data.read.record import Record
from sft.data.steps.join.step import Join
from sft.data.steps.join.teacher_index import open_index
from sft.utils.errors import UserError

ROWS: list[dict[str, Any]] = [
    {"sample_uuid": "a", "token_ids": [7, 200002, 199_997], "logprobs": [-0.5, 0.0, -3.25]},
    {"sample_uuid": "b", "token_ids": [1], "logprobs": [-1e-3]},
    {"sample_uuid": "c", "token_ids": list(range(5000)), "logprobs": [-n / 7 for n in range(5000)]},
]

MORE = [{"sample_uuid": f"x{n}", "token_ids": [n] * n, "logprobs": [-n / 2] * n} for n in range(1, 40)]


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=2)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _join(tmp_path: Path, rows: list[dict[str, Any]], ids: list[str], **settings: Any) -> list[Outcome]:
    path = _write(tmp_path / "other.jsonl", rows)
    records = [record(id=name) for name in ids]
    return run_rows("join", records, context(tmp_path / "step"), path=str(path), **settings)


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("other.jsonl", None),
        ("other.parquet", None),
        (
            "other.parquet",
            pa.schema(
                [
                    ("token_ids", pa.large_list(pa.uint32())),
                    ("sample_uuid", pa.large_string()),
                    ("logprobs", pa.large_list(pa.float32())),
                ]
            ),
        ),
    ],
)
def test_tokens_and_logprobs_arrive_as_they_are(tmp_path: Path, name: str, schema: pa.Schema | None) -> None:
    rows = [*MORE, *ROWS]
    path = _write(tmp_path / "set" / name, rows, schema)
    wanted = {row["sample_uuid"]: row for row in rows}
    records = [record(id=key) for key in ("c", "a", "x17", "b", "a")]
    outcomes = run_rows("join", records, context(tmp_path / "step"), path=str(path))
    for outcome in outcomes:
        assert isinstance(outcome, Kept)
        found, row = outcome.record, wanted[outcome.record.id]
        assert found.teacher_ids == row["token_ids"]
        assert found.teacher_logprobs == np.array(row["logprobs"], np.float32).tolist()
        assert found.facts["join"] == {"matched": True, "tokens": len(row["token_ids"])}


def test_rows_without_a_match_go_or_stay(tmp_path: Path) -> None:
    (outcome,) = _join(tmp_path, ROWS, ["nobody"])
    assert isinstance(outcome, Dropped) and outcome.reason == "no_match"
    assert "sample_uuid = 'nobody'" in outcome.detail
    (outcome,) = _join(tmp_path / "2", ROWS, ["nobody"], missing="keep")
    assert isinstance(outcome, Kept) and outcome.record.teacher_ids is None
    assert outcome.record.facts["join"] == {"matched": False}


@pytest.mark.parametrize(
    ("ids", "logprobs", "detail"),
    [
        ([1, 2], [-1.0], "2 tokens have 1 log probabilities"),
        ([], [], "there are no tokens"),
        (None, None, "there are no tokens"),
        ([1, 2], [-1.0, 0.5], "the log probability of token 1 is 0.5"),
        ([1, 2], [-1.0, None], "the log probability of token 1 is nan"),
        ([1, 2], [float("-inf"), -1.0], "the log probability of token 0 is -inf"),
        ([1, 2], [-1.0, -1e300], "the log probability of token 1 is -inf"),
        ([1, -2], [-1.0, -1.0], "token 1 is no token id"),
        ([1, 2**40], [-1.0, -1.0], "token 1 is no token id"),
        ([None, 1], [-1.0, -1.0], "token 0 is no token id"),
    ],
)
def test_bad_logprobs_are_dropped(tmp_path: Path, ids: Any, logprobs: Any, detail: str) -> None:
    rows = [{"sample_uuid": "bad", "token_ids": ids, "logprobs": logprobs}, *ROWS]
    bad, good = _join(tmp_path, rows, ["bad", "c"], missing="keep")
    assert isinstance(bad, Dropped) and (bad.reason, bad.detail) == ("bad_logprobs", detail)
    assert isinstance(good, Kept) and good.record.teacher_ids == list(range(5000))


def test_rounding_above_zero_is_zero(tmp_path: Path) -> None:
    (outcome,) = _join(tmp_path, [{"sample_uuid": "a", "token_ids": [1, 2], "logprobs": [2e-7, -1.0]}], ["a"])
    assert isinstance(outcome, Kept) and outcome.record.teacher_logprobs == [0.0, -1.0]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([*ROWS, *MORE, ROWS[0]], r"id 'a' is twice .* \(at or after other.jsonl:1, and other.jsonl:33\)"),
        (
            [*ROWS, {"sample_uuid": None, "token_ids": [1], "logprobs": [-1.0]}],
            "row 4 from there on has no 'sample_uuid'",
        ),
        ([{"sample_uuid": "a", "logprobs": [-1.0]}], "line 1: there is no column 'token_ids'; it has: logprobs"),
        ([{"sample_uuid": "a", "token_ids": "1 2", "logprobs": [-1.0]}], "'token_ids' is string; expected lists"),
        (
            [{"sample_uuid": "a", "token_ids": [1.5], "logprobs": [-1.0]}],
            r"'token_ids' is list<.*double>; expected lists",
        ),
        ([ROWS[0], {"sample_uuid": "b", "token_ids": [[1]], "logprobs": [-1.0]}], "lines 1 to 2 hold mixed values"),
    ],
)
def test_a_set_that_cant_be_joined_says_why(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _join(tmp_path, rows, ["a"])
    assert not list((tmp_path / "step").glob("*index*"))


def test_broken_lines_of_the_other_set_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "other.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n{broken\n")
    with pytest.raises(UserError, match="line 2 is no row"):
        run_rows("join", [record(id="a")], context(tmp_path / "step"), path=str(path))


def test_identity_is_the_other_sets_content(tmp_path: Path) -> None:
    path = _write(tmp_path / "other.jsonl", ROWS)
    config = entry("join", path=str(path)).config
    before = Join.identity(config)
    assert before == Join.identity(config)
    _write(path, ROWS[:2])
    assert Join.identity(config) != before
    for text, message in (("", "has no rows"), ('{"uuid": 1}\n', "no column 'sample_uuid'; it has: uuid")):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            Join.identity(config)
    with pytest.raises(UserError, match="no such file"):
        Join.identity(entry("join", path=str(tmp_path / "gone.jsonl")).config)
    with pytest.raises(UserError, match="no column 'ids'"):
        Join.identity(entry("join", path=str(_write(tmp_path / "x.parquet", ROWS)), teacher_ids="ids").config)


def _batches() -> Iterator[tuple[str, pa.RecordBatch]]:
    for row in ROWS:
        yield "place", pa.RecordBatch.from_pylist([row])


SCRIPT = """
import sys, time
from pathlib import Path
import pyarrow as pa
from sft.data.steps.join.teacher_index import open_index

folder, pause = Path(sys.argv[1]), float(sys.argv[2])

def read():
    with (folder / "built").open("a") as log:
        log.write("x")
    for number in range(20):
        yield "place", pa.RecordBatch.from_pylist([{"id": f"r{number}", "ids": [number] * 9, "logprobs": [-1.0] * 9}])
        print(number, flush=True)
        time.sleep(pause)

index = open_index(folder, read)
assert len(index) == 20 and all(index.get(f"r{n}")[0].tolist() == [n] * 9 for n in range(20))
print("done", flush=True)
"""


def _start(folder: Path, pause: float) -> subprocess.Popen[str]:
    script = textwrap.dedent(SCRIPT)
    return subprocess.Popen(
        [sys.executable, "-c", script, str(folder), str(pause)], stdout=subprocess.PIPE, text=True, cwd=os.getcwd()
    )


def test_several_processes_build_one_index(tmp_path: Path) -> None:
    processes = [_start(tmp_path, 0.05) for _ in range(3)]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(output.endswith("done\n") for output in outputs)
    assert (tmp_path / "built").read_text() == "x"


def test_a_kill_leaves_no_half_index(tmp_path: Path) -> None:
    process = _start(tmp_path, 60)
    assert read_line(process.stdout) == "0\n"
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=30)
    assert list(tmp_path.glob(".building-*")) and not (tmp_path / "index").exists()
    index = open_index(tmp_path, _batches)
    assert len(index) == 3 and index.get("r0") is None
    assert not list(tmp_path.glob(".building-*"))


def test_a_cut_index_is_built_again(tmp_path: Path) -> None:
    open_index(tmp_path, _batches)
    with (tmp_path / "index" / "ids.bin").open("r+b") as handle:
        handle.truncate(100)
    index = open_index(tmp_path, _batches)
    found = index.get("c")
    assert found is not None and found[0].tolist() == list(range(5000))


def test_an_empty_index_finds_nothing(tmp_path: Path) -> None:
    index = open_index(tmp_path, lambda: iter(()))
    assert len(index) == 0 and index.get("a") is None


def test_a_joined_row_survives_its_shard(tmp_path: Path) -> None:
    from sft.data.read.record import from_table, to_table

    (outcome,) = _join(tmp_path, ROWS, ["a"])
    back: Record = from_table(to_table([outcome.record]))[0]
    assert (back.teacher_ids, back.teacher_logprobs) == ([7, 200002, 199_997], [-0.5, 0.0, -3.25])


def test_a_set_on_the_hub_is_joined_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the download: what `datasets` gives for it is a memory-mapped table like this one."""
    import datasets

    rows = [*MORE, *ROWS]
    table = datasets.Dataset.from_list([{**row, "note": "not read"} for row in rows])
    asked = []

    def load(name: str, config: str | None, **others: Any) -> datasets.Dataset:
        asked.append((name, config, others))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    settings = {"path": "owner/logprobs", "config": "stage1", "split": "train", "revision": "abc"}
    assert Join.identity(entry("join", **settings).config)["other"]["hub"] == "owner/logprobs"
    outcomes = run_rows("join", [record(id="x39"), record(id="c")], context(tmp_path / "step"), **settings)
    assert [outcome.record.teacher_ids for outcome in outcomes] == [[39] * 39, list(range(5000))]
    keys = {"split": "train", "revision": "abc", "data_files": None}
    assert set(map(str, asked)) == {str(("owner/logprobs", "stage1", keys))}
    with pytest.raises(UserError, match=r"owner/logprobs:train: there is no column 'tokens'; it has: .*note"):
        Join.identity(entry("join", **settings, teacher_ids="tokens").config)
