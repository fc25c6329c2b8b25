"""What users and data call things is no markup: brackets, colons and dollars come out as they went in."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sft.cli.common import console, show_evaluations, show_results
from sft.cli.main import main
from sft.recipe import Recipe
from sft.utils.errors import shown

NAMES = ["[/]", "[/red]", "[red]x", "[bold", "a [link=x] b", ":smile:", "\\[x]", "$x^$", "100%"]


def recipe_at(folder: str) -> Recipe:
    stage = {"name": "one", "data": {"sources": [{"path": "a.jsonl"}]}}
    model = {"tokenizer": "tiny", "config": {}}
    return Recipe.model_validate({"name": "r", "output_dir": folder, "model": model, "stages": [stage]})


@pytest.mark.parametrize("name", NAMES)
def test_tables(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {"pass_at_1": 0.5, "interval": (0.25, 0.75), "problems": 4}
    result = {"stages": {"one": {"steps": 3, "final_loss": 1.5}}, "evaluations": {"one": {name: metrics}}}
    show_results(recipe_at(f"runs/{name}"), result)
    told = capsys.readouterr().out
    assert f"runs/{name}/stages/one/final" in told and told.count(name) == 2
    show_evaluations({name: {"suite": metrics}})
    assert name in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_prepared_data(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from sft.data.engine.accounts import FunnelLine, funnel_table

    line = FunnelLine(name, "length", 2, 1, "20", "10", [(name, 1)])
    console().print(funnel_table([line]))
    assert capsys.readouterr().out.count(name) == 2


def test_the_bar_of_training(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from sft.train.callbacks import Progress

    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    bar: Any = Progress("[/red]")
    state: Any = SimpleNamespace(is_world_process_zero=True, global_step=0, max_steps=5)
    bar.on_train_begin(None, state, None)
    bar.on_log(None, state, None, logs={"loss": 1.0, "learning_rate": 1e-3})
    bar.close()
    assert "[/red]" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_figures(name: str) -> None:
    from sft.report.drawing import as_svg, drawing, panels

    with drawing():
        figure, axes = panels(1)
        axes[0].set_title(name)
        assert "<text" in as_svg(figure) and re.search(r"<text[^>]*>", as_svg(figure))


def test_only_these_places_make_a_console(repo_root: Path) -> None:
    makers = [path.name for path in (repo_root / "sft").rglob("*.py") if re.search(r"\bConsole\(", path.read_text())]
    assert sorted(makers) == ["common.py"]


def test_what_a_terminal_would_obey_is_written_out(capsys: pytest.CaptureFixture[str], in_tmp: Path) -> None:
    assert shown("a\x1b[31mb\tc\nd é") == "a\\x1b[31mb\\tc\\nd é"
    assert main(["run", "--config", "no\x1b[2Jwhere"]) == 2
    told = capsys.readouterr().err
    assert "\x1b" not in told and "no\\x1b[2Jwhere" in told


@pytest.mark.parametrize(
    ("columns", "width"), [("80", 80), ("240", 240), (None, 160), ("", 160), ("0", 160), ("x", 160)]
)
def test_tables_that_go_to_a_file_are_as_wide_as_asked(
    monkeypatch: pytest.MonkeyPatch, columns: str | None, width: int
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns is not None:
        monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr("sys.stdout", io.StringIO())
    assert console().width == width
