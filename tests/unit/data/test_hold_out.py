"""Rows that are held out: by what they say, whatever their order; neither they nor what says the same is trained."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from data_toys import byte_tokenizer, stage_of

from sft.data.engine.accounts import funnel_lines
from sft.data.look.explain import story
from sft.data.prepare import PreparedStage, clean, prepare_stage
from sft.utils.errors import UserError


def row(number: int, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {number}?"}, {"role": "assistant", "content": f"It is {number}."}]
    return {"id": f"r{number}", "messages": messages, **more}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def prepared(root: Path, rows: list[dict[str, Any]], validation: dict[str, Any], **keys: Any) -> PreparedStage:
    train = {"max_length": 256, **keys.pop("train", {})}
    root.mkdir(exist_ok=True)
    source = {"path": str(write(root / "rows.jsonl", rows)), **keys.pop("source", {})}
    recipe = stage_of([source], root / "out", train, {"validation": validation, **keys})
    return prepare_stage(recipe, recipe.stages[0], byte_tokenizer())


def said(done: PreparedStage | None) -> list[str]:
    """The texts of all documents."""
    assert done is not None
    texts = []
    for one in done.dataset:
        start = 0
        for length in one["seq_lengths"]:
            texts.append(byte_tokenizer().decode(one["input_ids"][start : start + length]))
            start += length
    return sorted(texts)


@pytest.mark.parametrize(("size", "held"), [(0.2, 6), (7, 7), (1, 1), (0.001, 1)])
def test_a_share_or_a_number(size: float, held: int, tmp_path: Path) -> None:
    done = prepared(tmp_path, [row(n) for n in range(30)], {"size": size})
    assert done.validation is not None and done.validation.manifest["documents"] == held
    texts, kept = said(done), said(done.validation)
    assert len(set(texts) | set(kept)) == 30 and not set(texts) & set(kept)
    funnel = done.manifest["funnel"]
    assert (funnel["rows"], funnel["kept"], funnel["held_out"], funnel["dropped"]) == (30, 30 - held, held, {})


def test_the_same_rows_in_any_order_packing_and_number_of_processes(tmp_path: Path) -> None:
    rows = [row(n) for n in range(40)]
    first = said(prepared(tmp_path / "one", rows, {"size": 0.25}).validation)
    random.Random(0).shuffle(rows)
    renamed = [{**one, "id": f"x{place}"} for place, one in enumerate(rows)]
    packed = {"packing": True, "dataset_num_proc": 2}
    assert said(prepared(tmp_path / "two", renamed, {"size": 0.25}, train=packed).validation) == first
    assert said(prepared(tmp_path / "three", rows, {"size": 0.25}, seed=5).validation) != first


def test_what_says_the_same_is_not_trained(tmp_path: Path) -> None:
    """Copies under other ids, and copies that a step makes, go with the row that they are copies of."""
    rows = [row(n % 10) | {"id": f"r{n}"} for n in range(30)]
    mix = [{"mix": {"weights": {"rows": 1}, "max_repeats": 2, "tokens": 1380}}]
    done = prepared(tmp_path, rows, {"size": 3}, steps=mix)
    trained, held = said(done), said(done.validation)
    assert len(held) == 3 and len(set(trained)) == 7 and not set(trained) & set(held)
    funnel = done.manifest["funnel"]
    assert funnel["held_out"] == 3 and list(funnel["dropped"]) == ["hold_out: same_as_held_out"]
    assert funnel["rows"] + funnel["made"] == funnel["kept"] + funnel["held_out"] + sum(funnel["dropped"].values())


def test_rows_of_their_own(tmp_path: Path) -> None:
    own = write(tmp_path / "held.jsonl", [row(n) for n in (3, 4, 90)])
    done = prepared(tmp_path / "run", [row(n) for n in range(10)], {"sources": [{"path": str(own)}]})
    assert len(said(done.validation)) == 3 and len(said(done)) == 8
    assert not set(said(done)) & set(said(done.validation))
    funnel = done.manifest["funnel"]
    assert funnel["held_out"] == 3 and funnel["dropped"] == {"hold_out: same_as_held_out": 2}
    again = prepared(tmp_path / "run", [row(n) for n in range(10)], {"sources": [{"path": str(own)}]})
    assert again.manifest["key"] == done.manifest["key"]
    write(own, [row(91)])
    assert len(said(prepared(tmp_path / "run", [row(n) for n in range(10)], {"sources": [{"path": str(own)}]}))) == 10


def test_rows_too_long_to_train_on_are_not_held_out(tmp_path: Path) -> None:
    rows = [row(n) for n in range(4)] + [row(10**300 + n) for n in range(40)]
    done = prepared(tmp_path, rows, {"size": 2}, max_bad_fraction=1.0)
    assert len(said(done.validation)) == 2 and len(said(done)) == 2
    assert done.manifest["funnel"]["held_out"] == 2 and done.manifest["funnel"]["dropped"] == {"over_length": 40}


def test_held_out_rows_have_a_line_of_their_own(tmp_path: Path) -> None:
    done = prepared(tmp_path, [*(row(n) for n in range(10)), row(0)], {"size": 2})
    lines = {line.title: line for line in funnel_lines(done.manifest)}
    assert (lines["rows held out"].rows_in, lines["rows held out"].rows_out, lines["rows held out"].reasons) == (
        2,
        2,
        [],
    )
    step = lines["hold_out"]
    assert step.rows_in == step.rows_out + step.dropped + lines["rows held out"].rows_in == 11
    assert "held_out" not in dict(step.reasons) and lines["rows to train on"].rows_in == step.rows_out
    held = done.validation.dataset["document_ids"][0][0] if done.validation else ""
    (told,) = [line for line in story(done, held) if line.startswith("hold_out")]
    assert told.endswith("is held out: its loss is taken, and it isn't trained")


@pytest.mark.parametrize("size", [4, 0.9, 100])
def test_nothing_may_not_be_left(size: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.validation.size \S+ would hold out \d+ of 4 different rows"):
        prepared(tmp_path, [row(n) for n in range(4)], {"size": size})


@pytest.mark.parametrize("size", [0.05, 3])
def test_where_no_row_can_be_trained_on_the_reason_is_told(size: float, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No row is left to train on \(over_length: 5\).*max_length is 8; raise it"):
        prepared(tmp_path, [row(n) for n in range(5)], {"size": size}, train={"max_length": 8})


def test_clean_keeps_both(tmp_path: Path) -> None:
    write(tmp_path / "rows.jsonl", [row(n) for n in range(9)])
    recipe = stage_of([{"path": str(tmp_path / "rows.jsonl")}], tmp_path / "out", {}, {"validation": {"size": 2}})
    first = prepare_stage(recipe, recipe.stages[0], byte_tokenizer())
    clean(recipe, byte_tokenizer())
    assert first.validation is not None and first.path.is_dir() and first.validation.path.is_dir()
