# ruff: noqa: E501  (tables of cases read better with one case a line)
"""Grids: what a word of the command line holds, what points are called, and what is refused in a sentence."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from sft.recipe import load_recipe
from sft.recipe.grid import Grid, load_grid, shown, split_values
from sft.utils.errors import UsageError

RECIPE = """\
name: r
output_dir: ${where}
variables: {where: out, text: a}
model: {tokenizer: tiny, config: {hidden_size: 64}}
description: ${text}
stages:
  - name: one
    data: {sources: [{path: rows.jsonl}]}
  - name: two
    data: {sources: [{path: rows.jsonl}]}
    train: {max_steps: 2, learning_rate: 1e-3}
"""

SPLIT = [
    ("stages.two.train.learning_rate", "1e-5,2e-5, 4e-5", ["1e-5", "2e-5", " 4e-5"]),
    ("stages.two.train.learning_rate", "1e-5", ["1e-5"]),
    ("stages.two.train.lora_target_modules", "[fc1, fc2],all-linear", ["[fc1, fc2]", "all-linear"]),
    ("stages.two.train.lr_scheduler_kwargs", "{min_lr: 1, x: [1, 2]},{min_lr: 2}", ["{min_lr: 1, x: [1, 2]}", "{min_lr: 2}"]),
    ("description", "one\\, two,three", ["one, two", "three"]),
    ("description", "one\\, two", ["one, two"]),
    ("description", "[a,b", ["[a", "b"]),
    ("description", "{prompt}, please,now", ["{prompt}", " please", "now"]),
    ("description", "$a\\\\,b$", ["$a\\,b$"]),
    ("stages.two.train.warmup_steps", "]1,2", ["]1", "2"]),
    ("description", "", [""]),
]  # fmt: skip


@pytest.mark.parametrize(("key", "text", "values"), SPLIT)
def test_what_a_word_holds(key: str, text: str, values: list[str]) -> None:
    assert split_values(key, text) == values


@pytest.fixture
def grid(in_tmp: Path) -> Callable[..., Grid]:
    Path("r.yaml").write_text(RECIPE)
    return lambda *words: load_grid("r.yaml", words)


def test_the_last_axis_turns_fastest_and_values_have_their_types(grid: Callable[..., Grid]) -> None:
    made = grid("--stages.two.train.learning_rate", "1e-5,0.00002", "--seed=1,2", "--stages.one.train.max_steps", "7")
    assert [point.name for point in made.points] == [
        *("learning_rate=1e-05,seed=1", "learning_rate=1e-05,seed=2"),
        *("learning_rate=2e-05,seed=1", "learning_rate=2e-05,seed=2"),
    ]
    last = made.points[-1]
    assert last.values == {"learning_rate": 2e-5, "seed": 2}
    assert (last.recipe.stages[1].train.learning_rate, last.recipe.seed) == (2e-5, 2)
    assert {point.recipe.stages[0].train.max_steps for point in made.points} == {7}
    assert last.recipe.output_dir == "out/learning_rate=2e-05,seed=2" and made.root == Path("out")
    assert {point.recipe.prepared_dir for point in made.points} == {"out/prepared"}
    assert [axis.is_seed for axis in made.axes] == [False, True]


def test_a_point_is_the_recipe_with_its_values(grid: Callable[..., Grid]) -> None:
    point = grid(
        "--stages.two.train.learning_rate", "1e-5,2e-5", "--output_dir", "a ${b", "--prepared_dir", "p"
    ).points[1]
    words = ["--stages.two.train.learning_rate", "2e-5", "--output_dir", "x", "--prepared_dir", "p"]
    alone = load_recipe("r.yaml", words)
    assert point.recipe.output_dir == "a ${b/learning_rate=2e-05"
    assert point.recipe.model_copy(update={"output_dir": "x"}) == alone


def test_names_tell_keys_and_texts_apart(grid: Callable[..., Grid]) -> None:
    words = ("--stages.one.train.max_steps", "1,2", "--stages.two.train.max_steps", "1,2")
    assert grid(*words).points[1].name == "one.train.max_steps=1,two.train.max_steps=2"
    texts = [point.name for point in grid("--variables.text", "a b,a/b,a-b").points]
    assert len(set(texts)) == 3 and texts[2] == "text=a-b" and all("/" not in text for text in texts)
    long = grid("--variables.text", f"{'x' * 300},{'x' * 299}y")
    assert len({point.name for point in long.points}) == 2
    assert all(len(point.name.encode()) <= 200 for point in long.points)


@pytest.mark.parametrize(("value", "text"), [(1e-5, "1e-05"), (1.0, "1"), (1, "1"), (True, "true"), (None, "null"), ("x", "x"), ([1, "a"], '[1, "a"]')])  # fmt: skip
def test_a_value_is_shown_alike_however_it_was_written(value: object, text: str) -> None:
    assert shown(value) == text


WRONG = [
    (["--seed", "1"], "nothing is swept: give a key several values, as in --defaults.train.seed 1,2"),
    (["--seed", "1,2", "--seed", "3"], "nothing is swept: "),
    (["--seed", "1,,2"], "--seed: a value is empty in '1,,2'; a comma that belongs to a value is written \\,"),
    (["--seed", "1,2,"], "--seed: a value is empty in '1,2,'"),
    (["--stages.two.train.learning_rate", "1e-5,0.00001"], "--stages.two.train.learning_rate: has the value 1e-05 twice"),
    (["--output_dir", "a,b"], "--output_dir: can't be swept"),
    (["--prepared_dir", "a,b"], "--prepared_dir: can't be swept"),
    (["--variables.where", "a,b"], "output_dir follows from what is swept (a, b): name one folder"),
    (["--stages.two.train.learning_rat", "1e-5,2e-5"], "--stages.two.train.learning_rat: unknown key, did you mean learning_rate?"),
    (["--stages.three.train.seed", "1,2"], "--stages.three.train.seed: stages has no 'three'; there are: one, two"),
    (["--stages.two.train.max_steps", "1,x"], "--stages.two.train.max_steps: must be a whole number, got 'x'"),
    (["--stages.two.train.max_steps", "3,0"], "--stages.two.train.max_steps: 0 trains nothing"),
    (["--stages.all.train.max_length", "3", "--defaults.train.max_length", "4,5"], "max_length=4 and max_length=5 are the same recipe: what differs has no effect"),
    (["--stages.1.train.max_steps", "3,4", "--stages.two.train.max_steps", "5"], "max_steps=3 and max_steps=4 are the same recipe"),
    (["--seed", ",".join(map(str, range(50))), "--stages.two.train.max_steps", ",".join(map(str, range(1, 22)))], "1,050 points are too many for one sweep"),
    (["seed", "1,2"], "'seed': expected --key value"),
    (["--seed"], "--seed: needs a value"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "sentence"), WRONG)
def test_a_mistake_is_one_sentence(grid: Callable[..., Grid], words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        grid(*words)
    assert str(caught.value).startswith(sentence) and "\n" not in str(caught.value)


def test_what_a_recipes_reader_warns_of_comes_once(grid: Callable[..., Grid], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="sft.recipe.overrides"):
        grid("--seed", "1,2,3", "--defaults.train.learning_rate", "1e-4")
    assert len(caplog.records) == 1 and "two" not in caplog.text.partition("has no effect on")[0]
