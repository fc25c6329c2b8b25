"""Absurd recipes are refused in sentences that name the place: no traceback, no hang, no folder out of bounds."""

from __future__ import annotations

import copy
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sft.recipe import Recipe, RunPaths, load_recipe, resolved_yaml
from sft.recipe.packaged import list_data_recipes, list_recipes
from sft.recipe.yaml_marks import RecipeLoader
from sft.utils.errors import UsageError

NASTY = [
    *(".inf", "-.inf", ".nan", "1e999", "-1e999", "1e-400", "9" * 400, "-" + "9" * 400, "9" * 5000, "10" + "0" * 20),
    *("0", "-1", "-0.0", "1e308", "5e-324", "0x" + "f" * 40, "0b1", "0123", "1:30", "1_0", "9223372036854775807"),
    *("null", "~", "true", "yes", "''", "' '", "[]", "{}", "[[]]", "[null]", "[1, a]", "{a: 1}", "{'': ''}", "{1: 2}"),
    *("'..'", "'.'", "a/b", "../../x", "'/'", "x" * 300, "'a\\nb'", '"a\\nb"', '"a\\0b"', '"\\ud800"', '"\\e[31m"'),
    *('"a\\u2028b"', "'[bold]x[/]'", "'[/]'", "'${'", "'$${x}'", "'${nowhere}'", "'{'", "'%s'", "'~'", "'~nobody/x'"),
    *(
        "!!binary aGk=",
        "!!int abc",
        "!!float x",
        "!!bool maybe",
        "!!set {a}",
        "!!timestamp 2001",
        "!!null x",
        "=",
        "<<",
    ),
    *("!!python/name:os.system ''", "&a [*a]", "2001-01-01", "0o9", "1e", "CON", "-", "? a", "|", "*x", "\t"),
]
"""Pieces of YAML that a value may be replaced by."""


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a YAML tree, containers too."""
    if path:
        yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in pairs:
        yield from leaves(child, (*path, key))


MARK = "a-mark-that-stands-nowhere-else"


def replaced(tree: Any, path: tuple[Any, ...], piece: str) -> str:
    """The tree as YAML, with a piece of text in the place of one value."""
    tree = copy.deepcopy(tree)
    parent = tree
    for part in path[:-1]:
        parent = parent[part]
    parent[path[-1]] = MARK
    return yaml.safe_dump(tree, sort_keys=False, width=1000).replace(MARK, piece)


def outcome(path: Path) -> Recipe | None:
    """The recipe, or None where it was refused as it should be."""
    try:
        return load_recipe(path)
    except UsageError as error:
        for line in str(error).splitlines():
            assert re.match(r"\S+\.yaml(:\d+)?: .* ", line) and line.isprintable(), repr(line)
        return None


FILES = [(recipe.name, recipe.path) for recipe in list_recipes()]
FILES += [(recipe.name, recipe.path) for recipe in list_data_recipes()]


@pytest.mark.parametrize(("name", "file"), FILES, ids=[name for name, _ in FILES])
def test_a_value_replaced_by_a_nasty_one(name: str, file: Path, tmp_path: Path) -> None:
    """Forty values of each packaged recipe; what is accepted loads again."""
    tree = yaml.load(file.read_text(encoding="utf-8"), RecipeLoader)
    if "stages" not in tree:
        tree = {
            "name": "r",
            "output_dir": "o",
            "variables": tree.pop("variables", {}),
            "model": {"tokenizer": "tiny", "config": {}},
            "stages": [{"name": "s", "data": {key: tree[key] for key in tree if key not in ("name", "description")}}],
        }
    rng = random.Random(name)
    path = tmp_path / "r.yaml"
    for place in rng.sample(places := list(leaves(tree)), min(40, len(places))):
        piece = rng.choice(NASTY)
        path.write_text(replaced(tree, place, piece), encoding="utf-8")
        recipe = outcome(path)
        if recipe is not None:
            path.write_text(resolved_yaml(recipe), encoding="utf-8")
            assert load_recipe(path) == recipe, (place, piece)
            within(recipe)


def within(recipe: Recipe) -> None:
    """Names of stages and suites are folders inside the run's."""
    paths = RunPaths(recipe)
    for stage in recipe.stages:
        assert paths.stage_dir(stage.name).parent == paths.root / "stages" and stage.name not in (".", "..")
        for suite in stage.evaluate.suites:
            assert paths.eval_dir(stage.name, suite.name).parent == paths.eval_dir(stage.name) and suite.name[0] != "."


SMALL = """\
name: NAME
output_dir: OUTPUT
seed: SEED
model: {tokenizer: tiny, config: {hidden_size: 64}}
stages:
  - name: STAGE
    data: {sources: [{path: a.jsonl, name: SOURCE}], seed: SEED}
    train: {seed: SEED}
    evaluate:
      suites:
        - {name: SUITE, source: {path: b.jsonl}, seed: SEED}
        - {name: other, source: {generate: {rows: 5, seed: SEED}}}
"""
FINE = {"NAME": "r", "OUTPUT": "o", "SEED": "1", "STAGE": "s", "SOURCE": "a", "SUITE": "t"}
BAD_NAMES = ["'..'", "'.'", "''", '"a\\n"', '"\\na"', "a b", "'.hidden'", "x" * 300, '"a\\0"', "é", "'a/../b'", "'/a'"]


def small(**pieces: str) -> str:
    text = SMALL
    for key, piece in {**FINE, **pieces}.items():
        text = text.replace(key, piece)
    return text


@pytest.mark.parametrize("key", ["NAME", "STAGE", "SUITE", "SOURCE"])
@pytest.mark.parametrize("name", [*BAD_NAMES, "'a/b'", "all", "'12'"])
def test_names_stay_in_their_folder(key: str, name: str, tmp_path: Path) -> None:
    allowed = {"SOURCE": ("'a/b'", "all", "'12'"), "NAME": ("all", "'12'")}
    (tmp_path / "r.yaml").write_text(small(**{key: name}))
    if name in allowed.get(key, ()):
        load_recipe(tmp_path / "r.yaml")
        return
    with pytest.raises(UsageError, match=r"r\.yaml:\d+: .*name: "):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("pieces", "sentence"),
    [
        ({"STAGE": "start"}, "stages[0].name: can't be 'start': `sft` uses that word itself"),
        ({"SUITE": "manifest.json"}, "evaluate.suites[0].name: can't be 'manifest.json'"),
        ({"SUITE": "Other"}, "'other' differs from 'Other', the name of suites[0], by capital letters alone"),
        ({"SUITE": "other"}, "suites[1].name: 'other' is the name of suites[0] already"),
        ({"OUTPUT": '"a\\nb"'}, "output_dir: has a character that can't be shown, such as a line break"),
        ({"OUTPUT": "x" * 300}, "output_dir: is too long for a file system"),
        ({"OUTPUT": "' '"}, "output_dir: is empty"),
        ({"SEED": "100000000000000000000"}, "seed: is a number beyond 64 bits"),
        ({"SEED": "-1"}, "seed: must be greater than or equal to 0, got -1"),
        ({"SEED": "4294967296"}, "seed: must be less than or equal to 4294967295, got 4294967296"),
        ({"SEED": ".inf"}, "seed: must be a finite number"),
    ],
)  # fmt: skip
def test_what_is_told(pieces: dict[str, str], sentence: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(small(**pieces))
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "r.yaml")
    assert sentence in str(caught.value)


def test_paths_may_have_spaces_and_brackets(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(small(OUTPUT="'[red] a b[/]'"))
    assert load_recipe(tmp_path / "r.yaml").output_dir == "[red] a b[/]"


def test_deep_nesting_is_told(tmp_path: Path) -> None:
    for text in ("[" * 5000 + "]" * 5000, "a: " + "[" * 60 + "]" * 60, "\n".join(" " * i + "a:" for i in range(3000))):
        (tmp_path / "r.yaml").write_text(text)
        with pytest.raises(UsageError, match="nested more than 50 levels deep"):
            load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize("piece", NASTY)
def test_nasty_overrides(piece: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(small())
    for key in (
        "seed",
        "name",
        "stages",
        "stages.s.train.learning_rate",
        "stages.s.data.sources.0.path",
        "model.config.x",
    ):
        for override in (piece, yaml.safe_load(piece) if piece.startswith('"') else piece):
            try:
                load_recipe(tmp_path / "r.yaml", [f"--{key}={override}"])
            except UsageError as error:
                assert all(" " in line for line in str(error).splitlines())


@pytest.mark.parametrize("key", ["stages.².name", "stages.999999999999999999999.name", "stages.\udc80.name", "a\nb"])
def test_nasty_override_keys(key: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(small())
    with pytest.raises(UsageError):
        load_recipe(tmp_path / "r.yaml", [f"--{key}", "x"])


def test_data_recipes_that_multiply_are_bounded(in_tmp: Path) -> None:
    for number in range(40):
        inner = f"{{recipe: d{number + 1}.yaml}}"
        Path(f"d{number}.yaml").write_text(f"sources: [{inner}, {inner}]\n")
    Path("d40.yaml").write_text("sources: [{path: a.jsonl}]\n")
    Path("r.yaml").write_text(
        "name: r\noutput_dir: o\nmodel: {tokenizer: tiny, config: {}}\nstages: [{name: s, data: {recipe: d0.yaml}}]\n"
    )
    with pytest.raises(UsageError, match=r"more than 50,000 values|nested"):
        load_recipe("r.yaml")
