"""From sources through steps to a prepared stage: accounts, keys, continuation, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prepare_victim import hashes

from sft.data.engine import builder, worker
from sft.data.engine.shards import Account, Groups, ShardWriter
from sft.data.look.explain import story
from sft.data.look.find import put_aside
from sft.data.prepare import PreparedStage
from sft.data.read.outcomes import Kept, Replaced
from sft.data.read.record import aside_schema
from sft.data.steps.length import Length
from sft.utils.errors import UsageError, UserError

SUPPORT = Path(__file__).resolve().parents[3] / "support"
PAIR = {"prompt": "q", "completion": "a"}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "SHARD_ROWS", 25)


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Problems of growing length; every seventh repeats the one before it."""
    return [
        {
            "q": f"What is {n - (n % 7 == 0)} plus {n % 5}? " + "Think. " * (n % 13),
            "a": f"It is {n}." + " So." * (n % 11),
        }
        for n in range(start, start + count)
    ]


def test_every_row_is_in_exactly_one_place(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    rows: list[Any] = [*rows_of(180), "{broken", {"q": None, "a": "x"}, {"q": "spelled <|end|>", "a": "y"}]
    source = {"path": str(write_rows(rows)), "columns": PAIR}
    steps = [{"length": {"min_tokens": 60}}, {"dedup": {"by": "problem", "method": "exact"}}, {"select": {"rows": 90}}]
    done = prepare([source], steps=steps, max_bad_fraction=0.1)
    found = Counter(row["place"] for row in put_aside(done))
    found.update(name for row in done.dataset for name in row["document_ids"])
    assert found == Counter({f"rows.jsonl:{line}": 1 for line in range(1, len(rows) + 1)})
    for entry in done.manifest["steps"]:
        aside = [row for row in put_aside(done) if row["step"] == entry["title"]]
        assert len(aside) == entry["dropped"]["rows"] == entry["taken"]["rows"] - entry["kept"]["rows"], entry["title"]
    funnel = done.manifest["funnel"]
    assert funnel["rows"] == 183 and funnel["kept"] == 90
    assert funnel["rows"] + funnel["made"] == funnel["kept"] + sum(funnel["dropped"].values())
    assert funnel["bad"] == {"broken_json": 1, "control_token": 1, "null_value": 1}
    written = json.loads((done.path / "funnel.json").read_text())
    assert written["total"] == funnel and written["steps"] == done.manifest["steps"]


def test_the_rows_do_not_depend_on_processes_or_shards(
    prepare: Callable[..., PreparedStage], write_rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(write_rows(rows_of(160))), "columns": PAIR}
    steps = [{"dedup": {"by": "problem", "method": "exact"}}, {"select": {"rows": 70}}, {"length": {"max_tokens": 150}}]
    one = prepare([source], steps=steps, out=tmp_path / "one", train={"dataset_num_proc": 1})
    two = prepare([source], steps=steps, out=tmp_path / "two", train={"dataset_num_proc": 2})
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    monkeypatch.setattr(builder, "SHARD_ROWS", 1000)
    whole = prepare([source], steps=steps, out=tmp_path / "whole", train={"dataset_num_proc": 1})
    ids = [sorted(name for row in done.dataset["document_ids"] for name in row) for done in (one, two, whole)]
    assert ids[0] == ids[1] == ids[2] and len(ids[0]) > 10


def test_a_changed_step_runs_only_what_comes_after_it(
    prepare: Callable[..., PreparedStage], write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(write_rows(rows_of(80))), "columns": PAIR}
    dedup = {"dedup": {"by": "problem", "method": "exact"}}
    first, last = {"length": {"min_tokens": 50}}, {"length": {"max_tokens": 140}}
    prepare([source], steps=[first, dedup, last])
    ran: list[str] = []
    real = builder.Builder._make

    def noted(self: builder.Builder, made: Any, folder: Path) -> Any:
        ran.append(" ".join(node.step for node in made.nodes))
        return real(self, made, folder)

    monkeypatch.setattr(builder.Builder, "_make", noted)
    prepare([source], steps=[first, dedup, last])
    assert ran == []
    prepare([source], steps=[first, dedup, {"length": {"max_tokens": 130}}])
    assert ran == ["dedup length fit"]
    prepare([source], steps=[{"length": {"min_tokens": 51}}, dedup, last])
    assert ran == ["dedup length fit", "read tokenize length", "dedup length fit"]


def test_a_new_version_of_a_step_runs_it_again(
    prepare: Callable[..., PreparedStage], write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(write_rows(rows_of(30))), "columns": PAIR}
    first = prepare([source], steps=[{"length": {"min_tokens": 50}}])
    monkeypatch.setattr(Length, "version", 2)
    assert prepare([source], steps=[{"length": {"min_tokens": 50}}]).manifest["key"] != first.manifest["key"]


def test_a_step_that_failed_continues_at_the_shard_where_it_failed(
    prepare: Callable[..., PreparedStage], write_rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"path": str(write_rows(rows_of(100))), "columns": PAIR}
    seen: list[int] = []
    real = Length.__call__

    def failing(self: Length, batch: list[Any]) -> Any:
        seen.append(len(batch))
        if len(seen) == 3:
            raise OSError(28, "No space left on device")
        return real(self, batch)

    monkeypatch.setattr(Length, "__call__", failing)
    options = {"steps": [{"length": {"min_tokens": 1}}], "train": {"dataset_num_proc": 1}}
    with pytest.raises(UserError, match="no space left while preparing data"):
        prepare([source], **options)
    assert prepare([source], **options).manifest["funnel"]["kept"] == 100
    assert seen == [25] * 5  # two shards, the one that failed, and then only the two that weren't done


def test_killed_runs_continue_to_the_same_rows(tmp_path: Path, write_rows: Any) -> None:
    source = write_rows(rows_of(350))
    command = [sys.executable, str(SUPPORT / "prepare_victim.py"), str(source), str(tmp_path / "k"), "6", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all continued to the same rows" in done.stdout


def test_a_lost_row_is_noticed(tmp_path: Path) -> None:
    from step_toys import record

    class Losing(Account):
        def _keep(self, item: Any) -> Any:
            return super()._keep(item) if item.id != "b" else item

    account = Losing("losing", Groups(tmp_path / "aside.parquet", aside_schema()))
    for name in "abc":
        account.add(Kept(record(id=name)))
    with pytest.raises(AssertionError, match="losing: rows of rows taken and of what became of them differ"):
        account.described()


def test_a_row_lost_between_two_steps_is_noticed(tmp_path: Path) -> None:
    from step_toys import record

    with pytest.raises(AssertionError, match="lost between two steps"), ShardWriter(tmp_path, 0, ["a", "b"]) as writer:
        for name in "abc":
            writer.accounts[0].add(Kept(record(id=name)))
        for name in "ab":
            writer.accounts[1].add(Kept(record(id=name)))
        writer.finish()


def test_copies_have_names_of_their_own() -> None:
    from step_toys import record

    outcome = worker._carried_out("mix", record(id="a"), {"copies": 3, "facts": None, "reason": None, "detail": None})
    assert isinstance(outcome, Replaced) and [item.id for item in outcome.kept] == ["a", "a#2", "a#3"]


def test_recipes_nest_and_their_steps_apply_to_their_rows_alone(
    prepare: Callable[..., PreparedStage], write_rows: Any, tmp_path: Path
) -> None:
    inner = {
        "name": "inner",
        "sources": [{"path": str(write_rows(rows_of(40))), "columns": PAIR}],
        "steps": [{"length": {"max_tokens": 1}}],
    }
    plain = {"path": str(write_rows(rows_of(20, start=500), "other.jsonl")), "columns": PAIR}
    done = prepare([inner, plain], steps=[{"length": {"min_tokens": 1}}])
    titles = [entry["title"] for entry in done.manifest["steps"]]
    assert titles == [
        "inner/rows: read", "inner/tokenize", "inner/length", "other: read", "tokenize", "length", "fit",
    ]  # fmt: skip
    assert done.manifest["funnel"]["dropped"] == {"length: too_long": 40}
    assert [leaf["rows"] for leaf in done.manifest["inputs"]] == [40, 20]


def test_explain_tells_a_rows_story(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    source = {"path": str(write_rows(rows_of(60))), "columns": PAIR}
    done = prepare([source], steps=[{"length": {"min_tokens": 60}}])
    kept = done.dataset[0]["document_ids"][0]
    lines = list(story(done, kept))
    assert lines[0] == "rows: read, tokenize, length, fit: it came through"
    assert len(lines) == 2 and lines[1].startswith(f"trained: {kept} is document 0")
    dropped = done.manifest["steps"][-2]["examples"]["too_short"][0]["id"]
    read, tokenized, last = story(done, dropped)
    assert read == f"rows: read: {dropped} ({dropped}) is read"
    assert last.startswith(f"length: {dropped} ({dropped}) too_short: ")
    assert tokenized.startswith(f"tokenize: {dropped} ({dropped}) has ") and "of them trained" in tokenized
    assert list(story(done, "nobody")) == []


def test_explain_tells_what_changed_at_each_step_once(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    rows = [{"id": f"r{n}", "q": f"What is {n}?", "a": f"so \\boxed{{{n}}}", "gold": str(n)} for n in range(30)]
    source = {"path": str(write_rows(rows)), "columns": {**PAIR, "id": "id", "answer": "gold"}}
    steps: list[Any] = ["render", "verify", {"dedup": {"by": "problem", "method": "exact"}}, {"select": {"rows": 20}}]
    done = prepare([source], steps=steps)
    kept = done.dataset[0]["document_ids"][0]
    lines = list(story(done, kept))
    told = [line.split(": " + kept)[0] for line in lines]
    assert told[:2] == ["rows: read", "render"] and "verify" in told and told[-2].endswith("fit: it came through")
    (verified,) = [line for line in lines if "verdict right" in line]
    assert (
        verified.startswith("verify: ") and len([line for line in lines if "tokens, " in line and "has" in line]) == 1
    )
    # By its place in the file the same is told.
    assert list(story(done, f"rows.jsonl:{int(kept[1:]) + 1}")) == lines
    left = next(row for row in (f"r{n}" for n in range(30)) if row not in str(done.dataset["document_ids"][:]))
    *_, last = story(done, left)
    assert last.startswith(f"select: {left} (rows.jsonl:{int(left[1:]) + 1}) over_rows")


def test_explain_tells_of_a_rows_children(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    rows = [{"q": f"What is {n}?", "a": ["one", "two"], "ok": [True, False]} for n in range(6)]
    source = {"path": str(write_rows(rows)), "columns": {"prompt": "q"}, "rows": "problems", "carry": ["a", "ok"]}
    explode = {"explode_rollouts": {"column": "a", "flags": {"right": "ok"}}}
    done = prepare([source], steps=[explode, {"select": {"rows": 12}}])
    lines = list(story(done, "rows.jsonl:2"))
    for child, flag in ((0, "true"), (1, "false")):
        (line,) = [line for line in lines if line.startswith(f"explode_rollouts: rows.jsonl:2#g{child} ")]
        assert f"index {child}" in line and flag in line
    assert sum(line.startswith("trained: rows.jsonl:2#g") for line in lines) == 2


@pytest.mark.parametrize(
    ("source", "steps", "error", "message"),
    [
        ({"carry": ["nope"]}, ["quality"], UserError, "`carry` names a column 'nope' that isn't there; it has: a, q"),
        ({"rows": "problems"}, [], UsageError, "problems without answers, and no step gives them one"),
        ({}, [{"explode_rollouts": {"column": "a"}}], UsageError, "uses the column 'a', which rows must name under"),
        (
            {},
            [{"dedup": {"prefer": ["row"]}}],
            UsageError,
            "speaks of a source 'row' that it doesn't get, did you mean rows",
        ),
        ({"columns": {"prompt": "zz"}}, ["quality"], UserError, "names a column 'zz' that isn't there"),
    ],
)
def test_mistakes_are_one_sentence(
    prepare: Callable[..., PreparedStage],
    write_rows: Any,
    source: Any,
    steps: Any,
    error: type[Exception],
    message: str,
) -> None:
    path = str(write_rows(rows_of(10)))
    columns = {"prompt": "q"} if source.get("rows") == "problems" else PAIR
    with pytest.raises(error, match=message) as raised:
        prepare([{"path": path, "columns": columns, **source}], steps=steps)
    assert "\n" not in str(raised.value)


def test_a_source_named_twice_is_refused(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    source = {"path": str(write_rows(rows_of(10))), "columns": PAIR}
    with pytest.raises(UsageError, match="rows is named as a source 2 times with the same settings"):
        prepare([source, source], steps=[{"length": {"max_tokens": 1000}}])


def test_two_processes_prepare_the_same_recipe_at_once(tmp_path: Path, write_rows: Any) -> None:
    source, go = write_rows(rows_of(300)), tmp_path / "go"
    script = (
        f"import sys, time; sys.path.insert(0, {str(SUPPORT)!r})\n"
        "from pathlib import Path\nimport prepare_victim as v\n"
        f"here, go = Path({str(tmp_path)!r}), Path({str(go)!r})\n"
        f"v.prepare({str(source)!r}, here / ('warm' + sys.argv[1])); (here / ('ready' + sys.argv[1])).touch()\n"
        "end = time.monotonic() + 120\n"
        "while not go.exists() and time.monotonic() < end: time.sleep(0.01)\n"
        f"v.prepare({str(source)!r}, here / 'both'); print(v.hashes(here / 'both'))\n"
    )
    both = [
        subprocess.Popen([sys.executable, "-c", script, str(number)], stdout=subprocess.PIPE, text=True)
        for number in range(2)
    ]
    # Both have imported everything before either begins.
    end = time.monotonic() + 100
    while len(list(tmp_path.glob("ready*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    go.touch()
    out = {process.communicate(timeout=300)[0].strip() for process in both}
    assert len(out) == 1 and all(process.returncode == 0 for process in both)


@pytest.mark.slow
def test_a_hundred_killed_runs_continue_to_the_same_rows(tmp_path: Path, write_rows: Any) -> None:
    source = write_rows(rows_of(700))
    command = [sys.executable, str(SUPPORT / "prepare_victim.py"), str(source), str(tmp_path / "k"), "100", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_dropped_says_by_what(prepare: Callable[..., PreparedStage], write_rows: Any) -> None:
    source = {"path": str(write_rows(rows_of(10))), "columns": PAIR}
    with pytest.raises(UserError, match=r"No row is left to train on \(length: too_long: 10\)"):
        prepare([source], steps=[{"length": {"max_tokens": 1}}])
