"""Tables on narrow terminals: numbers stay whole, and what isn't needed goes first."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from sft.cli.common import show_evaluations, show_results
from sft.data.engine.accounts import FunnelLine, funnel_table
from sft.recipe import Recipe


def printed(table: Any, width: int) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(table)
    return out.getvalue()


@pytest.mark.parametrize("width", [50, 60, 80, 160])
def test_the_funnel_keeps_its_rows(width: int) -> None:
    reasons = [("not_the_same_answer_as_most", 123_456), ("too_long", 7)]
    lines = [
        FunnelLine("a-source-with-a-long-name: read", "read", 2_345_678, 2_222_215, "34,567,890,123", "4,567", reasons),
        FunnelLine("length", "length", 2_222_215, 2_222_215, "4,567", "4,567", [], seconds=12.5),
    ]
    text = printed(funnel_table(lines, width), width)
    assert max(map(len, text.splitlines())) <= width and "\u2026" not in text
    assert text.count("2,222,215") >= 2 and "123,456" in text.replace("\n", "")
    assert ("tokens in" in text) == (width == 160) and ("34,567,890,123" in text) == (width == 160)


@pytest.mark.parametrize("width", [60, 80])
def test_results_keep_steps_and_paths(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sft.cli.common.console", lambda: Console(width=width))
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "output_dir": "runs/a-name-of-some-length",
            "model": {"tokenizer": "tiny", "config": {}},
            "stages": [{"name": "midtraining", "data": {"sources": [{"path": "a.jsonl"}]}}],
        }
    )
    manifest = {"steps": 123_456, "final_loss": 0.4714, "counters": {"supervised_tokens": 12_345_678_901}}
    result: dict[str, Any] = {"stages": {"midtraining": manifest}, "evaluations": {}}
    show_results(recipe, result)
    text = capsys.readouterr().out
    assert "123456" in text and "\u2026" not in text and max(map(len, text.splitlines())) <= width
    head, *rows = text.splitlines()[1:]
    assert (
        "".join(row[head.index("model") :].strip() for row in rows) == f"{recipe.output_dir}/stages/midtraining/final"
    )


def test_without_suites_there_is_no_table(capsys: pytest.CaptureFixture[str]) -> None:
    for results in ({}, {"start": {}, "one": {}}):
        show_evaluations(results)
    assert capsys.readouterr().out == ""
    show_evaluations({"start": {}, "one": {"sums": {"pass_at_1": 0.5, "interval": (0.4, 0.6), "problems": 10}}})
    assert len(capsys.readouterr().out.splitlines()) == 2
