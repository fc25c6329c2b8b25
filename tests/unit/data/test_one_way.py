"""One way for a row: with steps and without, the same templates, limits, masks, names and accounts."""

from __future__ import annotations

import gzip
import json
import logging
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import data_toys
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_toys import stage_of
from prepare_victim import hashes

from sft.data.engine import builder
from sft.data.look.explain import story
from sft.data.look.find import put_aside
from sft.data.prepare import PreparedStage, clean, prepare_stage
from sft.recipe.asked import asked_as
from sft.recipe.schema import DataSection
from sft.utils.errors import UsageError, UserError

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]
PAIR = {"prompt": "q", "completion": "a"}
# A step that changes nothing: the other way that there was.
STEPS: list[Any] = [[], [{"length": {"min_tokens": 1}}]]


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"q": f"What is {n}?", "a": f"It is {n}."} for n in range(count)]


def texts(prepared: PreparedStage, toy: Any) -> list[str]:
    return sorted(toy.decode(row["input_ids"]) for row in prepared.dataset)


def trained(prepared: PreparedStage, toy: Any) -> list[str]:
    """What is trained of each row."""
    return [
        toy.decode([i for i, kept in zip(row["input_ids"], row["assistant_masks"], strict=True) if kept])
        for row in prepared.dataset
    ]


@pytest.mark.parametrize("steps", STEPS)
def test_a_source_s_own_templates_count(prepare: Prepare, write_rows: Write, toy: Any, steps: Any) -> None:
    source = {
        "path": str(write_rows(rows_of(1))),
        "columns": PAIR,
        "prompt_template": "S {prompt}",
        "system_prompt": "X",
    }
    done = prepare([source], steps=steps, prompt_template="D {prompt}", completion_template="<{completion}>")
    (text,) = texts(done, toy)
    assert text.startswith("<|system|>X<|end|><|user|>S What is 0?<|end|><|assistant|><It is 0.><|end|>")


@pytest.mark.parametrize("steps", STEPS)
def test_too_many_bad_rows_stop_the_run(prepare: Prepare, write_rows: Write, steps: Any) -> None:
    rows = [*rows_of(10), *({"q": "q", "a": f"{n}<|end|>"} for n in range(40))]
    source = {"path": str(write_rows(rows)), "columns": PAIR}
    for _ in range(2):
        with pytest.raises(UserError, match=r"40 of 50 rows are bad \(control_token: 40\), more than"):
            prepare([source], steps=steps)
    assert len(prepare([source], steps=steps, max_bad_fraction=0.8).dataset) == 10
    with pytest.raises(UserError, match="40 of 50 rows are bad"):
        prepare([source], steps=steps)


def test_what_render_took_out_does_not_come_back(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    source = {"path": str(write_rows(rows_of(3))), "columns": PAIR}
    done = prepare([source], steps=[{"render": {"system": "drop"}}], system_prompt="Be brief.")
    assert not any("Be brief" in text for text in texts(done, toy))
    (counted,) = [entry["kept"]["tokens"] for entry in done.manifest["steps"] if entry["step"] == "tokenize"]
    assert counted == done.manifest["tokens"] == sum(len(row["input_ids"]) for row in done.dataset)


def conversation() -> dict[str, Any]:
    said = ["u1", "<think>\nt1\n</think>\n\na1", "u2", "plain", "u3", "<think>\nt3\n</think>\n\na3"]
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said)]}


def test_answers_that_lost_their_thinking_are_context(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    path = write_rows([conversation()])
    (whole,) = trained(prepare(path, steps=[{"render": {"history_think": "keep"}}]), toy)
    assert whole.count("<|end|>") == 3 and "t1" in whole
    stripped = prepare(path, steps=[{"render": {}}], out=path.parent / "stripped")
    (said,) = trained(stripped, toy)
    assert said == "plain<|end|><think>\nt3\n</think>\n\na3<|end|><|endoftext|>"
    assert "a1<|end|>" in texts(stripped, toy)[0] and "t1" not in texts(stripped, toy)[0]


def test_the_last_answer_alone(prepare: Prepare, write_rows: Write, toy: Any) -> None:
    (said,) = trained(prepare(write_rows([conversation()]), mask_history=True), toy)
    assert said == "<think>\nt3\n</think>\n\na3<|end|><|endoftext|>"


def test_a_text_is_tokenised_once(prepare: Prepare, write_rows: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.data.tokenize import tokens

    seen: list[str] = []
    real = tokens.tokenize_owned

    def noted(tokenizer: Any, items: Any, most: int | None) -> Any:
        seen.extend(item.text for item in items)
        return real(tokenizer, items, most)

    monkeypatch.setattr(tokens, "tokenize_owned", noted)
    rows = [{"q": f"What is {n}?", "r": [f"{n} {k}" for k in range(3)]} for n in range(20)]
    source = {"path": str(write_rows(rows)), "columns": {"prompt": "q"}, "rows": "problems", "carry": ["r"]}
    steps = [
        {"explode_rollouts": {"column": "r"}},
        {"render": {}},
        {"length": {"min_tokens": 2}},
        {"select": {"rows": 40}},
    ]
    assert len(prepare([source], steps=steps).dataset) == 40
    assert len(seen) == len(set(seen)) == 60


# ---- content decides, not order, files or names ----


@pytest.mark.parametrize("steps", [[{"select": {"rows": 20}}], [{"mix": {"weights": {"rows": 1}, "tokens": 600}}]])
def test_order_and_files_change_nothing(prepare: Prepare, tmp_path: Path, toy: Any, steps: Any) -> None:
    rows = rows_of(60)
    shuffled = random.Random(0).sample(rows, 60)
    cuts = {"one": [rows], "other order": [shuffled], "three files": [shuffled[:10], shuffled[10:11], shuffled[11:]]}
    found = []
    for name, parts in cuts.items():
        folder = tmp_path / name / "rows"
        folder.mkdir(parents=True)
        for number, part in enumerate(parts):
            (folder / f"{number}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
        done = prepare(
            [{"path": str(folder), "columns": PAIR, "name": "rows"}], steps=steps, out=tmp_path / name / "out"
        )
        found.append(texts(done, toy))
    assert found[0] == found[1] == found[2] and 0 < len(found[0]) < 60


def test_files_of_one_name_are_two_sources(prepare: Prepare, write_rows: Write, tmp_path: Path) -> None:
    for name, count in (("a", 3), ("b", 4)):
        write_rows([{"q": f"{name} {n}", "a": "x" * (n + 1)} for n in range(count)], f"{name}/train.jsonl")
    sources = [{"path": str(tmp_path / name / "train.jsonl"), "columns": PAIR} for name in "ab"]
    done = prepare(sources, steps=[{"mix": {"weights": {"a/train": 1, "b/train": 1}, "max_repeats": 1}}])
    names = [name for row in done.dataset for name in row["document_ids"]]
    assert len(set(names)) == len(names) and {name.split("/")[0] for name in names} == {"a", "b"}
    with pytest.raises(UsageError, match="Two sources are called x: give each a `name` of its own"):
        prepare([{**source, "name": "x"} for source in sources])


def test_generated_sources_are_told_apart(prepare: Prepare) -> None:
    done = prepare([{"generate": {"rows": 5, "seed": seed}} for seed in (1, 2, 3)], train={"max_length": 4096})
    assert set(done.manifest["steps"][-1]["sources"]) == {"generate:all", "generate:all 2", "generate:all 3"}


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet"])
def test_parts_are_the_whole(
    prepare: Prepare, tmp_path: Path, toy: Any, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    rows, path = rows_of(50), tmp_path / f"rows.{kind}"
    lines = "\ufeff" + "\n".join(
        ["", *(json.dumps(row) for row in rows[:20]), "", "{broken", *map(json.dumps, rows[20:])]
    )
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        (gzip.open if kind.endswith("gz") else open)(path, "wb").write(lines.encode())
    found = []
    for size in (3, 1000):
        monkeypatch.setattr(builder, "SHARD_ROWS", size)
        done = prepare([{"path": str(path), "columns": PAIR}], out=tmp_path / str(size), max_bad_fraction=0.1)
        limited = prepare(
            [{"path": str(path), "columns": PAIR, "max_rows": 31}], out=tmp_path / str(size), max_bad_fraction=0.1
        )
        ids = [[name for row in store.dataset for name in row["document_ids"]] for store in (done, limited)]
        found.append((texts(done, toy), *ids, [row["place"] for row in put_aside(done)]))
    assert found[0] == found[1] and len(found[0][0]) == 50
    assert len(found[0][2]) == (31 if kind == "parquet" else 30)


# ---- folders ----


def test_a_folder_s_files_are_chosen_as_on_the_hub(
    prepare: Prepare, write_rows: Write, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, count in (("set/stage1.jsonl", 2), ("set/stage2.jsonl", 3), ("set/main/train.jsonl", 4)):
        write_rows(rows_of(count), name)
    folder = str(tmp_path / "set")
    for more, count in (
        ({"data_files": "*stage2*"}, 3),
        ({"data_files": ["stage1.jsonl", "*2*"]}, 5),
        ({"config": "main"}, 4),
    ):
        assert len(prepare([{"path": folder, "columns": PAIR, **more}], out=tmp_path / str(count)).dataset) == count
    with pytest.raises(UserError, match=r"no .jsonl or .* file there that data_files \(none\*\) means"):
        prepare([{"path": folder, "columns": PAIR, "data_files": "none*"}])
    with caplog.at_level(logging.WARNING, "sft.data"):
        assert len(prepare([{"path": folder, "columns": PAIR}]).dataset) == 4
    assert "1 files named after the split 'train'; 2 others, such as stage1.jsonl, are left out" in caplog.text


# ---- errors ----


def test_a_damaged_gz_is_told(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    raw = bytearray(gzip.compress("".join(json.dumps(row) + "\n" for row in rows_of(500)).encode()))
    raw[len(raw) // 2 : len(raw) // 2 + 40] = b"\xff" * 40
    path.write_bytes(bytes(raw))
    with pytest.raises(UserError, match=r"rows.jsonl.gz: can't be read: .*; copy or download it again"):
        prepare([{"path": str(path), "columns": PAIR}])


def test_half_a_surrogate_and_huge_numbers_are_data(prepare: Prepare, write_rows: Write) -> None:
    rows: list[Any] = [
        {"q": "1?", "a": "1", "gold": "\ud800", "size": 1234567},
        {"q": "2?", "a": "2", "gold": "2", "size": int("9" * 400)},
        {"q": "3?", "a": "3", "gold": "3", "size": 1234568},
        {"q": "4?", "a": "4", "gold": "4", "size": "\udfff"},
        {"q": "\ud800", "a": "5", "gold": "\ud800", "size": 1},
    ]
    source = {"path": str(write_rows(rows)), "columns": {**PAIR, "answer": "gold"}, "carry": ["size"]}
    done = prepare([source], steps=[{"filter": {"column": "size", "min": 10}}], max_bad_fraction=0.5)
    assert done.manifest["funnel"]["dropped"] == {"bad": 1, "filter: filter_missing": 1}
    one = prepare([source], steps=[{"filter": {"column": "size", "one_of": [1234567]}}], max_bad_fraction=0.5)
    assert len(one.dataset) == 1


def test_explain_finds_bad_rows_and_cut_ones(prepare: Prepare, write_rows: Write) -> None:
    path = write_rows([*rows_of(3), "{broken", {"q": "q", "a": "x" * 90}])
    done = prepare(
        [{"path": str(path), "columns": PAIR}], train={"max_length": 60}, over_length="truncate", max_bad_fraction=0.5
    )
    assert next(story(done, "rows.jsonl:4")).startswith("rows: read: rows.jsonl:4 (rows.jsonl:4) bad: broken_json: ")
    told = list(story(done, "rows.jsonl:5"))
    assert "fit: rows.jsonl:5 (rows.jsonl:5) cut at max_length" in "\n".join(told)
    assert told[-1].startswith("trained: rows.jsonl:5 is document 0 of row 3, 60 tokens")
    # A bad row with an id of its own is found by it, and by its place, with folders before the file's name too.
    named = write_rows([*rows_of(3), {"id": "mine", "q": 5, "a": "x"}], "named.jsonl")
    done = prepare([{"path": str(named), "columns": {**PAIR, "id": "id"}}], max_bad_fraction=0.5)
    for name in ("mine", "named.jsonl:4", str(named) + ":4"):
        assert list(story(done, name)) == [
            "named: read: mine (named.jsonl:4) bad: wrong_type: 'q' is int, expected text"
        ]


# ---- what stays on the disk ----


def test_clean_leaves_what_the_recipe_needs(prepare: Prepare, write_rows: Write, toy: Any, tmp_path: Path) -> None:
    source = {"path": str(write_rows(rows_of(40))), "columns": PAIR}
    step = [{"select": {"rows": 20}}]
    prepare([source], steps=[{"select": {"rows": 30}}])
    kept = prepare([source], steps=step)
    recipe = stage_of([source], tmp_path / "out", {"dataset_num_proc": 1}, {"steps": step})
    assert clean(recipe, toy) > 0 and clean(recipe, toy) == 0
    before = hashes(tmp_path / "out")
    assert prepare([source], steps=step).path == kept.path and hashes(tmp_path / "out") == before
    assert {path.name for path in kept.path.parent.iterdir() if len(path.name) == 32} == {kept.path.name}


def test_eight_steps_write_little(gsm8k: list[dict[str, str]], write_rows: Write, phi: Any, tmp_path: Path) -> None:
    path = write_rows(gsm8k[:3000])
    steps: list[Any] = [
        {"render": {}},
        {"quality": {"think": "optional", "answer": "any"}},
        {"verify": {"missing_gold": "keep", "gold": "answer"}},
        {"length": {"min_tokens": 5}},
        {"dedup": {"by": "problem", "method": "exact"}},
        {"length": {"max_tokens": 5000}},
        {"select": {"rows": 2500}},
        {"mix": {"weights": {"rows": 1}}},
    ]
    source = {"path": str(path), "columns": {"prompt": "question", "completion": "answer"}}
    recipe = stage_of([source], tmp_path / "out", {"dataset_num_proc": 1}, {"steps": steps})
    done = prepare_stage(recipe, recipe.stages[0], phi)
    assert len(done.dataset) == 2500
    written = sum(file.stat().st_size for folder in done.passes for file in folder.rglob("*") if file.is_file())
    assert written < 2 * path.stat().st_size


def test_a_script_without_a_guard_prepares_in_several_processes(write_rows: Write, tmp_path: Path) -> None:
    """Processes that start don't run the script again."""
    support = Path(data_toys.__file__).parent
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(support)!r})\n"
        "from data_toys import byte_tokenizer, stage_of\nfrom pathlib import Path\n"
        "from sft.data.engine import builder\nfrom sft.data.prepare import prepare_stage\n"
        "builder.SHARD_ROWS = 10\n"
        f"source = {{'path': {str(write_rows(rows_of(40)))!r}, 'columns': {PAIR!r}}}\n"
        f"recipe = stage_of([source], Path({str(tmp_path / 'out')!r}), {{'dataset_num_proc': 2}}, {{}})\n"
        "print(len(prepare_stage(recipe, recipe.stages[0], byte_tokenizer()).dataset))\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout.strip()) == (0, "40"), done.stderr[-2000:]


# ---- how a stage asks ----


@pytest.mark.parametrize(
    ("section", "asked"),
    [
        ({}, (None, None)),
        ({"prompt_template": "D {prompt}", "system_prompt": "X"}, ("D {prompt}", "X")),
        (
            {"sources": [{"path": "a", "prompt_template": "S {prompt}"}], "prompt_template": "D {prompt}"},
            ("S {prompt}", None),
        ),
        (
            {"prompt_template": "D {prompt}", "steps": [{"render": {"prompt_template": "R {prompt}!"}}]},
            ("R D {prompt}!", None),
        ),
        ({"system_prompt": "X", "steps": [{"render": {"system": "drop"}}]}, (None, None)),
        ({"steps": [{"render": {"system": "replace", "system_prompt": "Y"}}], "system_prompt": "X"}, (None, "Y")),
        ({"steps": [{"render": {"system_prompt": "Y"}}]}, (None, "Y")),
    ],
)
def test_suites_ask_as_the_rows_did(section: dict[str, Any], asked: tuple[str | None, str | None]) -> None:
    found = asked_as(DataSection.model_validate({"sources": [{"path": "a"}], **section}))
    assert (found.prompt_template, found.system_prompt) == asked


def test_sources_that_ask_in_different_ways_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    sources = [{"path": "a", "prompt_template": "A {prompt}"}, {"path": "b"}]
    with caplog.at_level(logging.WARNING, "sft.recipe"):
        found = asked_as(DataSection.model_validate({"sources": sources, "prompt_template": "D {prompt}"}))
    assert found.prompt_template == "D {prompt}" and "ask in different ways" in caplog.text
