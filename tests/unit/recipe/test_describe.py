"""The schema for people and for editors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sft.cli.main import main
from sft.recipe.describe import find_section, json_schema, keys_of, sections
from sft.recipe.packaged import list_data_recipes, list_recipes
from sft.recipe.steps import StepEntry
from sft.recipe.yaml_marks import parse_document


@pytest.fixture(scope="module")
def validator() -> Any:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    return jsonschema.Draft202012Validator(json_schema())


def test_every_key_of_every_section_is_described() -> None:
    found = {(section.__name__, key.name): key for section in sections().values() for key in keys_of(section)}
    assert [name for name, key in found.items() if not key.meaning] == []


def test_every_step_is_a_section() -> None:
    for name in StepEntry.model_fields:
        path, _ = find_section(name)
        assert path == f"stages.data.steps.{name}"


@pytest.mark.parametrize("name", [recipe.name for recipe in list_recipes()])
def test_packaged_recipes_fit_the_schema(validator: Any, name: str) -> None:
    (path,) = [recipe.path for recipe in list_recipes() if recipe.name == name]
    validator.validate(parse_document(path.read_text(), str(path)).value)


@pytest.mark.parametrize("name", [recipe.name for recipe in list_data_recipes()])
def test_packaged_data_recipes_fit_the_schema_of_a_stage(validator: Any, name: str) -> None:
    (path,) = [recipe.path for recipe in list_data_recipes() if recipe.name == name]
    data = parse_document(path.read_text(), str(path)).value
    variables = data.pop("variables", {})
    stages = [{"name": "one", "data": data}]
    recipe = {"name": "r", "output_dir": "o", "model": {}, "variables": variables, "stages": stages}
    validator.validate(recipe)


@pytest.mark.parametrize("piece", [{"learning_rat": 1}, {"max_steps": "many"}, {"optim": "adam_of_old"}])
def test_the_schema_refuses_mistakes(validator: Any, piece: dict[str, Any]) -> None:
    stage = {"name": "one", "data": {"sources": [{"path": "rows.jsonl"}]}, "train": piece}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"name": "r", "output_dir": "o", "model": {}, "stages": [stage]})


def test_the_command_shows_keys_and_schema(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "keys", "mix"]) == 0
    out = capsys.readouterr().out
    assert "keys of stages.data.steps.mix" in out and "max_repeats" in out and "required" in out
    assert main(["recipes", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert main(["recipes", "keys", "trian"]) == 2
    assert capsys.readouterr().err == "sft: no section 'trian', did you mean train?\n"


def test_data_recipes_are_shown_and_copied(in_tmp: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = {recipe.name: recipe.path.read_text() for recipe in list_data_recipes()}
    assert main(["recipes", "show", "limo-v2"]) == 0
    assert capsys.readouterr().out == texts["limo-v2"]
    assert main(["recipes", "copy", "gsm8k", "data.yaml", "--data"]) == 0
    assert Path("data.yaml").read_text() == texts["gsm8k"]
    assert "`data: {recipe: data.yaml}`" in capsys.readouterr().out


def test_keys_name_the_sections_inside_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "keys", "data"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line == "sections inside: sources, steps, validation; `sft recipes keys SECTION` shows one"
