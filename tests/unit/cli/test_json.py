"""`--json`: one object on standard output whatever happens, stable codes, and a page that knows them all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import sft.cli.told as told
from sft.cli.main import VERBS, main
from sft.train.alerts import KINDS
from sft.utils.error_codes import _OF_FOLDER, CODES, as_json, code_of
from sft.utils.errors import UserError

Told = Callable[..., dict[str, Any]]


@pytest.fixture
def object_of(capsys: pytest.CaptureFixture[str]) -> Told:
    """What a command prints on standard output, which has to be one object, and its status with it."""

    def run(*words: str, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*words, "--json"]) == status
        found = json.loads(capsys.readouterr().out)
        assert isinstance(found, dict)
        return found

    return run


def test_the_page_has_every_verb_code_and_kind(repo_root: Path) -> None:
    page = (repo_root / "docs/json.md").read_text()
    verbs = {
        name for cell in re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE) for name in cell.split(", ")
    }
    assert {f"`{verb}`" for verb in VERBS if verb != "serve"} <= verbs
    for names in (CODES, KINDS):
        assert all(f"| `{name}` | {meaning} |" in page for name, meaning in names.items())
    shown = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    error = shown["error"]
    assert as_json(_raised("recipe", error["message"]), error["message"], 2) == shown


def test_every_folder_has_a_code(repo_root: Path) -> None:
    folders = {path.parent.name for path in (repo_root / "sft").glob("*/__init__.py")} - {"model"}
    assert folders == set(_OF_FOLDER) and set(_OF_FOLDER.values()) <= set(CODES)


def test_mistakes_of_a_recipe_have_places(object_of: Told, tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("name: x\noutput_dir: out\nstages:\n  - {name: a, data: {sources: [{path: rows.jsonl}]}}\nnam: 3\n")
    found = object_of("run", str(path), "--stages.a.train.lerning_rate", "1", status=2)
    assert found["exit_status"] == 2 and found["error"]["code"] == "recipe"
    problems = {problem["key"]: problem for problem in found["error"]["problems"]}
    assert problems["nam"]["line"] == 5 and problems["nam"]["file"] == str(path)
    assert problems["stages.a.train.lerning_rate"]["file"] is None
    assert found["error"]["message"].count("\n") + 1 == len(problems)


@pytest.mark.parametrize(
    ("words", "code", "status"),
    [
        (["nonsense"], "usage", 2),
        (["report"], "usage", 2),
        (["eval", "--suite", "math500"], "usage", 2),
        (["eval", "--suite", "gone.yaml", "--model", "."], "recipe", 2),
        (["compare", "gone", "away"], "usage", 2),
        (["recipes", "show", "gone"], "recipe", 2),
        (["export", "--model", "."], "usage", 2),
        (["chat", "--model", "gone"], "usage", 2),
    ],
)
def test_errors_have_codes(
    object_of: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], code: str, status: int
) -> None:
    monkeypatch.chdir(tmp_path)
    found = object_of(*words, status=status)
    assert set(found) == {"error", "exit_status"} and found["exit_status"] == status
    assert found["error"]["code"] == code and found["error"]["message"]


def _raised(folder: str, text: str, kind: type[Exception] = UserError) -> Exception:
    """An error that a module of sft's `folder` has raised."""
    names: dict[str, Any] = {"__name__": f"sft.{folder}.module", "kind": kind, "text": text}
    exec("def raise_it():\n    raise kind(text)", names)
    try:
        names["raise_it"]()
    except Exception as error:
        return error
    raise AssertionError


def test_codes_of_failures() -> None:
    assert code_of(MemoryError()) == "out-of-memory" and code_of(KeyboardInterrupt()) == "interrupted"
    assert code_of(OSError(28, "No space left")) == "disk-full" and code_of(ZeroDivisionError()) == "internal"
    assert code_of(_raised("hub", "gone")) == "hub"


def test_what_processes_tell_is_handed_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with told.handed_up(True) as found:
        told.tell({"a": 1})
        assert capsys.readouterr().out == ""
    assert found == {"a": 1}
    with told.handed_up(True) as nothing:
        pass
    assert nothing == {}
    told.tell({"a": [2, (float("nan"), {"b": float("inf")})]})
    assert json.loads(capsys.readouterr().out) == {"a": [2, [None, {"b": None}]]}


def test_json_behind_two_dashes_is_the_other_command_s() -> None:
    assert told.wants_json(["launch", "--slurm", "--json", "--", "run", "tiny"])
    assert not told.wants_json(["launch", "--slurm", "--", "run", "tiny", "--json"])
    assert not told.wants_json(["serve", "--json"])
