"""Overrides: text as the shell gives it, errors that name the option, and what has no effect."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sft.recipe import Recipe, load_recipe
from sft.utils.errors import UsageError

RECIPE = """\
name: r
output_dir: out
model: {tokenizer: tiny, config: {hidden_size: 64}}
defaults: {train: {learning_rate: 1e-4}}
stages:
  - name: one
    data: {sources: [{path: rows.jsonl}]}
    train: {max_steps: 2, learning_rate: 1e-3}
  - name: two
    data: {sources: [{path: rows.jsonl}]}
    train: {max_steps: 2}
"""


@pytest.fixture
def load(in_tmp: Path) -> Any:
    Path("r.yaml").write_text(RECIPE)
    return lambda *words: load_recipe("r.yaml", words)


TEXTS = ["see issue #3", "#1 run", "a\nb", "2024", "true", "~", "1e-4", "- x", "{a}", "[b] c", "'q'", "a: b", " x ", ""]


TEXT_KEYS: dict[str, Callable[[Recipe], str | None]] = {
    "push.commit_message": lambda recipe: recipe.push.commit_message,
    "report.title": lambda recipe: recipe.report.title,
    "description": lambda recipe: recipe.description,
    "stages.one.train.run_name": lambda recipe: recipe.stages[0].train.run_name,
    "defaults.train.run_name": lambda recipe: recipe.stages[1].train.run_name,
}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("key", TEXT_KEYS)
def test_text_is_taken_as_the_shell_gives_it(load: Any, key: str, text: str) -> None:
    assert TEXT_KEYS[key](load(f"--{key}", text)) == text


def test_numbers_lists_and_nothing_are_still_meant(load: Any) -> None:
    recipe: Recipe = load(
        *("--name", "2024", "--seed", " 7 ", "--push.repo_id", "null", "--stages.two.train.use_peft", "true"),
        *("--stages.two.train.lora_target_modules", "[fc1, fc2]", "--stages.one.train.report_to", "wandb"),
        *("--defaults.train.warmup_steps", "0.1", "--model.config.hidden_size", "128"),
    )
    assert (recipe.name, recipe.seed, recipe.push.repo_id) == ("2024", 7, None)
    assert recipe.stages[1].train.lora_target_modules == ["fc1", "fc2"]
    assert recipe.stages[0].train.report_to == "wandb" and recipe.stages[0].train.warmup_steps == 0.1
    assert recipe.model.config == {"hidden_size": 128}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seed", "010"], "--seed: must be a whole number, got '010'"),
        (["--seed", "1:30"], "--seed: must be a whole number, got '1:30'"),
        (["--seed", "7 # seven"], "--seed: must be a whole number, got '7 # seven'"),
        (["--push", "{repo: x}"], "--push: repo: unknown key, did you mean repo_id?"),
        (["--report.titel", "x"], "--report.titel: unknown key, did you mean title?"),
        (["--seed", "1", "--model.model_name_or_path", "a/b"], "--model.model_name_or_path: r.yaml:3: model: needs"),
        (["--stages.one.data.sources.0.generate.rows", "5"], "--stages.one.data.sources.0.generate.rows: r.yaml:7: "),
        (["--stages.two.data.sources.0", "{generate: {min_steps: 3}}"], "--stages.two.data.sources.0: generate.rows: "),
        (["--stages.two.data", "{sources: []}"], "--stages.two.data: sources: "),
    ],
)
def test_errors_name_the_option(load: Any, words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(*words)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value), str(caught.value)


def test_a_default_that_no_stage_takes_is_refused(load: Any) -> None:
    with pytest.raises(
        UsageError, match=r"--defaults.train.max_steps: has no effect.*r.yaml:8.*--stages.all.train.max"
    ):
        load("--defaults.train.max_steps", "9")


def test_a_stage_that_keeps_its_own_value_is_told(load: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        recipe = load("--defaults.train.learning_rate", "3")
    assert [stage.train.learning_rate for stage in recipe.stages] == [1e-3, 3]
    (record,) = caplog.records
    assert record.getMessage() == (
        "--defaults.train.learning_rate: has no effect on r.yaml:8: stages[0].train.learning_rate, which wins"
    )
