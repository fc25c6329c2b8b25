"""Suites in recipes: by packaged name, by file, and with changes; whatever is wrong is told where it stands."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sft.recipe import Recipe, load_recipe, resolved_yaml
from sft.recipe.describe import json_schema
from sft.recipe.packaged import list_suites
from sft.recipe.suites import load_suites
from sft.recipe.yaml_marks import parse_document
from sft.utils.errors import UsageError

RECIPE = """\
name: r
output_dir: run
variables: {{which: math500}}
model: {{tokenizer: tiny, config: {{}}}}
defaults:
  evaluate:
    suites: {suites}
stages:
  - {{name: one, data: {{sources: [{{path: a.jsonl}}]}}}}
  - {{name: two, data: {{sources: [{{path: a.jsonl}}]}}}}
"""


def recipe_of(suites: str, *overrides: str) -> Recipe:
    Path("r.yaml").write_text(RECIPE.format(suites=suites))
    return load_recipe("r.yaml", overrides)


def error_of(suites: str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        recipe_of(suites, *overrides)
    return str(caught.value)


def test_a_name_a_file_and_changes(in_tmp: Path) -> None:
    Path("mine.yaml").write_text("# Mine\nsuite: math500\nsource: {path: mine.jsonl}\nmax_problems: 7\n")
    recipe = recipe_of("[math500, mine.yaml, {suite: aime24, name: few, max_problems: 5, source: {revision: abc}}]")
    for stage in recipe.stages:
        math, mine, few = stage.evaluate.suites
        assert math == load_suites(["math500"]).suites[0]
        # A source of its own takes the place of the file's; nothing of that is left.
        assert (mine.name, mine.max_problems, mine.samples_per_problem) == ("mine", 7, 8)
        assert (mine.source.path, mine.source.split) == ("mine.jsonl", "train")
        # One that names no data adds to it.
        assert (few.name, few.source.path, few.source.revision) == ("few", "HuggingFaceH4/aime_2024", "abc")
        assert all(suite.suite is None for suite in stage.evaluate.suites)


def test_a_variable_may_name_a_suite_and_set_what_a_file_leaves_open(in_tmp: Path) -> None:
    Path("mine.yaml").write_text("variables: {rows: 3}\nsource: {generate: {rows: '${rows}'}}\n")
    recipe = recipe_of("['${which}', mine.yaml]", "--variables.which", "gsm8k", "--variables.rows", "9")
    gsm8k, mine = recipe.stages[1].evaluate.suites
    assert gsm8k.name == "gsm8k" and mine.source.generate is not None and mine.source.generate.rows == 9


def test_overrides_reach_the_suites_of_a_stage(in_tmp: Path) -> None:
    words = ("--stages.one.evaluate.suites.math500.max_length", "4096", "--stages.two.evaluate.suites", "[tiny]")
    recipe = recipe_of("[math500]", *words)
    (math,), (tiny,) = (stage.evaluate.suites for stage in recipe.stages)
    assert (math.max_length, math.max_new_tokens) == (4096, 4096) and tiny.name == "tiny"


def test_what_is_resolved_needs_no_suite_file(in_tmp: Path) -> None:
    Path("mine.yaml").write_text("suite: gpqa_diamond\nprompt_template: 'Cost: $${x} {prompt}'\n")
    recipe = recipe_of("[mine.yaml]")
    Path("mine.yaml").unlink()
    Path("resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe("resolved.yaml") == recipe
    assert recipe.stages[0].evaluate.suites[0].prompt_template == "Cost: ${x} {prompt}"


@pytest.mark.parametrize(
    ("suites", "overrides", "message"),
    [
        ("[mat500]", (), "r.yaml:7: defaults.evaluate.suites[0].suite: mat500: no such suite file, and no packaged "
         "suite of that name, did you mean math500?"),
        ("[{suite: math500, max_leng: 5}]", (), "r.yaml:7: defaults.evaluate.suites[0].max_leng: unknown key, did you "
         "mean max_length?"),
        ("[math500, math500]", (), "name: 'math500' is the name of suites[0] already"),
        ("[bad.yaml]", (), "bad.yaml:2: max_new_tokens: must be greater than 0, got 0"),
        ("[list.yaml]", (), "list.yaml:1: a suite is a mapping of keys such as source"),
        ("[round.yaml]", (), "the suite is made from itself: round.yaml -> other.yaml -> round.yaml"),
        ("[{suite: 5}]", (), "suites[0].suite: must be text, got 5"),
        ("[{name: s}]", (), "suites[0].source: is missing"),
        ("[math500]", ("--stages.one.evaluate.suites.0.suite", "tiny"), "--stages.one.evaluate.suites.0.suite: has no "
         "effect, the suite here is filled in already"),
        ("[folder]", (), "folder: is a folder; name a suite file"),
        ("['${nothing}']", (), "no variable ${nothing}"),
    ],
)  # fmt: skip
def test_mistakes_are_told_where_they_stand(
    in_tmp: Path, suites: str, overrides: tuple[str, ...], message: str
) -> None:
    Path("bad.yaml").write_text("source: {path: a.jsonl}\nmax_new_tokens: 0\n")
    Path("list.yaml").write_text("- a\n")
    Path("round.yaml").write_text("suite: other.yaml\n")
    Path("other.yaml").write_text("suite: round.yaml\n")
    Path("folder").mkdir()
    assert message in error_of(suites, *overrides)


@pytest.mark.parametrize(
    ("names", "overrides", "message"),
    [
        (["mat500"], (), "--suite mat500: mat500: no such suite file"),
        (["tiny", "tiny"], (), "--suite tiny: name: 'tiny' is the name of suites[0] already"),
        (["tiny"], ("--suites.tiny.max_leng", "5"), "--suites.tiny.max_leng: unknown key, did you mean max_length?"),
        (["tiny"], ("--suites.tony.max_length", "5"), "suites has no 'tony'; there are: tiny"),
        (["tiny"], ("--suites.tiny.top_p", "5"), "--suites.tiny.top_p: must be less than or equal to 1, got 5"),
        (["tiny"], ("--suites.tiny.suite", "gsm8k"), "--suites.tiny.suite: has no effect"),
        (["tiny"], ("--suite_s", "1"), "--suite_s: unknown key, did you mean suites?"),
        (["tiny"], ("word",), "expected --key value"),
    ],
)
def test_without_a_recipe_too(names: list[str], overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_suites(names, overrides)
    assert message in str(caught.value)


def test_overrides_without_a_recipe_are_typed() -> None:
    words = ("--suites.all.prompt_template", "12 {prompt}", "--suites.tiny.batch_size=7", "--verify_workers", "3")
    section = load_suites(["tiny", "gsm8k"], words)
    assert [suite.prompt_template for suite in section.suites] == ["12 {prompt}"] * 2
    assert section.suites[0].batch_size == 7 and section.verify_workers == 3


@pytest.mark.parametrize("name", [suite.name for suite in list_suites()])
def test_packaged_suites_fit_the_schema(name: str) -> None:
    validator: Any = jsonschema.Draft202012Validator(json_schema())
    (path,) = [suite.path for suite in list_suites() if suite.name == name]
    for suite in (name, {"suite": name, "max_problems": 5}, parse_document(path.read_text(), str(path)).value):
        stage = {"name": "one", "data": {"sources": [{"path": "a"}]}, "evaluate": {"suites": [suite]}}
        validator.validate({"name": "r", "output_dir": "o", "model": {}, "stages": [stage]})
    wrong = {"name": "one", "evaluate": {"suites": [{"suite": name, "max_problem": 5}]}}
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({"name": "r", "output_dir": "o", "model": {}, "stages": [wrong]})
