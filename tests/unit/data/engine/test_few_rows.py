"""Few rows stay in one process, however many sources, files and steps there are; many don't, to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_toys import byte_tokenizer, stage_of

from sft.answers import pool
from sft.data.engine import builder
from sft.data.engine.local import LocalEngine
from sft.data.prepare import PreparedStage, prepare_stage
from sft.utils.hashes import folder_hashes

VERIFY: dict[str, Any] = {"verify": {"keep": ["right"]}}
LENGTH: dict[str, Any] = {"length": {"min_tokens": 1}}


def write(path: Path, first: int, rows: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [
        {
            "problem": f"Halve {n}.",
            "solution": f"It is \\boxed{{\\sqrt{{{n * n}}}/2}}.",
            "answer": f"\\frac{{{n}}}{{2}}",
        }
        for n in range(first, first + rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def prepared(root: Path, out: str, check: dict[str, Any]) -> PreparedStage:
    """Three sources, one of them of four files, each checked, then all again behind steps that see all rows."""
    columns = {"prompt": "problem", "completion": "solution", "answer": "answer"}
    sources = [
        {"path": str(write(root / "a.jsonl", 100, 12)), "columns": columns, "steps": [check]},
        {"path": str(write(root / "b.jsonl", 200, 12)), "columns": columns, "steps": [check]},
        {"path": str(root / "c"), "columns": columns, "steps": [check]},
    ]
    for number in range(4):
        write(root / "c" / f"{number}.jsonl", 300 + 3 * number, 3)
    steps = [{"dedup": {}}, check, {"select": {"rows": 30}}, check]
    recipe = stage_of(sources, root / out, {"packing": True, "dataset_num_proc": 2}, {"steps": steps})
    return prepare_stage(recipe, recipe.stages[0], byte_tokenizer())


def test_twelve_rows_a_source_start_no_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But the one that compares answers as mathematics: once for all steps, and it is gone at the end."""
    monkeypatch.setattr(LocalEngine, "_started", lambda self: pytest.fail("started processes"))
    judges: list[Any] = []
    start = pool._Worker.__init__
    monkeypatch.setattr(pool._Worker, "__init__", lambda self: (start(self), judges.append(self))[0])
    done = prepared(tmp_path, "out", VERIFY)
    assert done.manifest["documents"] == 30
    assert len(judges) == 1 and judges[0].process.poll() is not None and not pool._spare


def test_more_rows_are_shared_out_and_come_to_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = prepared(tmp_path, "few", LENGTH)
    started: list[int] = []
    begin = LocalEngine._started
    monkeypatch.setattr(LocalEngine, "_started", lambda self: (started.append(1), begin(self))[1])
    monkeypatch.setattr(builder, "SHARD_ROWS", 5)
    many = prepared(tmp_path, "many", LENGTH)
    assert started and few.manifest["key"] == many.manifest["key"]
    rows = [folder_hashes(done.path, ("rows-*.arrow",)) for done in (few, many)]
    assert rows[0] == rows[1] and few.dataset["document_ids"] == many.dataset["document_ids"]
