"""`sft preview` and `sft prepare` as they are typed: which rows are shown, pages, figures, and wrong options."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sft.cli.main import main


@pytest.fixture
def words(toy: Any, in_tmp: Path) -> list[str]:
    """Options that name a recipe of two stages; only the first has data steps."""
    toy.save_pretrained("tokenizer")
    rows = [{"id": f"r{n}", "prompt": f"What is {n}?", "completion": f"It is {n}. " * n} for n in range(1, 25)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source: dict[str, Any] = {
        "path": "rows.jsonl",
        "columns": {"prompt": "prompt", "completion": "completion", "id": "id"},
    }
    train = {"max_length": 128, "packing": True, "dataset_num_proc": 1}
    steps = [{"length": {"max_tokens": 150}}]
    stages = [
        {"name": "one", "data": {"sources": [source], "steps": steps, "over_length": "truncate"}, "train": train},
        {"name": "two", "data": {"sources": [source]}, "train": {**train, "max_length": 64}},
    ]
    model = {"tokenizer": "tokenizer", "config": {"hidden_size": 32}}
    # JSON is YAML.
    Path("r.yaml").write_text(json.dumps({"name": "demo", "output_dir": "run", "model": model, "stages": stages}))
    return ["--config", "r.yaml"]


def test_prepare_leaves_figures_beside_the_rows(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", *words]) == 0
    out = capsys.readouterr().out
    (folder,) = [path for path in Path("run/prepared").glob("*/figures")]
    assert f"figures: {folder}" in out and "rows to train on" in out and "too_long" in out and "over_length" in out
    assert {path.name for path in folder.iterdir()} == {"funnel.png", "lengths.png", "sources.png"}
    # Figures are no part of what is looked up.
    assert main(["prepare", *words]) == 0 and len(list(Path("run/prepared").glob("*/manifest.json"))) == 2


def test_numbers_are_told_where_figures_cannot_be_written(
    words: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["prepare", *words]) == 0
    (figures,) = Path("run/prepared").glob("*/figures")
    shutil.rmtree(figures)
    figures.write_text("in the way")
    capsys.readouterr()
    assert main(["prepare", *words]) == 0
    out = capsys.readouterr().out
    assert "rows to train on" in out and "figures:" not in out
    assert "the figures can't be written to" in caplog.text


def test_one_row_by_its_number_and_by_its_id(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *words, "--stage", "one", "--row", "1", "--row", "0"]) == 0
    out = capsys.readouterr().out
    assert out.index("row 1 of") < out.index("row 0 of") and "row 2 of" not in out and "rows in" not in out
    assert main(["preview", *words, "--id", "r8"]) == 0
    out = capsys.readouterr().out
    # In the second stage it is too long.
    assert out.count("-- document") == 1 and ": r8: " in out and "demo: one" in out and "demo: two" not in out


def test_pages_of_several_stages(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preview", *words, "--html", "page.html"]) == 0
    assert capsys.readouterr().out.split() == ["page-one.html", "page-two.html"]
    one, two = (Path(f"page-{name}.html").read_text() for name in ("one", "two"))
    # The length of what came before a step is only known where there are steps.
    assert "<svg" in one and "<svg" not in two and "<b>over_length</b>" in two and 'id="row-0-1"' in two


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--row", "99"], 1, "sft: There is no row 99: the stage's"),
        (["--id", "nosuch"], 1, "sft: No row to train on has the id 'nosuch'; `sft prepare --explain` tells"),
        (["--row", "-1"], 2, "sft: argument --row: rows are counted from 0, not -1"),
        (["--row", "1", "--rows", "2"], 2, "sft: --rows, --row and --id exclude each other"),
    ],
)
def test_wrong_rows_are_one_sentence(
    words: list[str], capsys: pytest.CaptureFixture[str], options: list[str], status: int, message: str
) -> None:
    assert main(["preview", *words, *options]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sft:")]
    assert len(err) == 1 and err[0].startswith(message), err


def test_explain_finds_the_row_for_which_preparing_fails(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"id": "fine", "prompt": "a", "completion": "b"}, {"id": "bad", "prompt": "a", "completion": ""}]
    (in_tmp / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (in_tmp / "recipe.yaml").write_text(
        "name: r\noutput_dir: out\nmodel: {tokenizer: tiny, config: {}}\nstages:\n"
        "  - {name: one, data: {max_bad_fraction: 0.0, sources: [{path: rows.jsonl, columns: {prompt: prompt, "
        "completion: completion, id: id}}]}}\n"
    )
    assert main(["prepare", "recipe.yaml", "--explain", "bad"]) == 1
    told = capsys.readouterr()
    assert "bad (rows.jsonl:2) bad: empty_answer: 'completion' is empty" in told.out and "rows are bad" in told.err
    assert main(["prepare", "recipe.yaml", "--data.max_bad_fraction", "0.6", "--explain", "nobody"]) != 0
