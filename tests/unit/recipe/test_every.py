"""`evaluate.every` and what stops a stage by it: what a recipe may say, and what it is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sft.recipe import Recipe, load_recipe, resolved_yaml
from sft.recipe.data_checks import recipe_problems
from sft.recipe.outcome_keys import stops
from sft.utils.errors import UsageError

RECIPE = """\
name: r
output_dir: run
model: {tokenizer: tiny, config: {hidden_size: 64}}
stages:
  - name: one
    data: {sources: [{path: rows.jsonl}]}
    evaluate:
      suites: [{name: a, source: {path: a.jsonl}, max_problems: 5}, {name: b, source: {path: b.jsonl}}]
      every: EVERY
"""


def loaded(tmp_path: Path, every: str, more: str = "", overrides: tuple[str, ...] = ()) -> Recipe:
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE.replace("EVERY", every) + more)
    return load_recipe(path, overrides)


@pytest.mark.parametrize(
    ("every", "steps", "tokens", "problems"),
    [
        ("200 steps", 200, None, {"a": 5, "b": None}),
        ("1 step", 1, None, {"a": 5, "b": None}),
        ("1_000_000 tokens", None, 1_000_000, {"a": 5, "b": None}),
        ("{steps: 7, suites: [b]}", 7, None, {"b": None}),
        ("{tokens: 9, max_problems: 8}", None, 9, {"a": 5, "b": 8}),
        ("{steps: 1, max_problems: 2, suites: [b, a]}", 1, None, {"a": 2, "b": 2}),
    ],
)
def test_what_it_says(tmp_path: Path, every: str, steps: int, tokens: int, problems: dict[str, int]) -> None:
    recipe = loaded(tmp_path, every)
    evaluate = recipe.stages[0].evaluate
    assert evaluate.every is not None and (evaluate.every.steps, evaluate.every.tokens) == (steps, tokens)
    assert {suite.name: suite.max_problems for suite in evaluate.while_training()} == problems
    assert [suite.max_problems for suite in evaluate.suites] == [5, None]
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


def test_on_the_command_line(tmp_path: Path) -> None:
    recipe = loaded(tmp_path, "200 steps", overrides=("--stages.one.evaluate.every", "30 tokens"))
    every = recipe.stages[0].evaluate.every
    assert every is not None and (every.steps, every.tokens) == (None, 30)
    again = loaded(tmp_path, "{steps: 2}", overrides=("--stages.one.evaluate.every.max_problems", "4"))
    assert [suite.max_problems for suite in again.stages[0].evaluate.while_training()] == [4, 4]
    off = loaded(tmp_path, "200 steps", overrides=("--stages.one.evaluate.every", "null"))
    assert off.stages[0].evaluate.while_training() == []


WORD = "is a number of steps or tokens, such as `200 steps` or `1_000_000 tokens`, got "


@pytest.mark.parametrize(
    ("every", "line"),
    [
        ("200", f"every: {WORD}200"),
        ("0 steps", f"every: {WORD}'0 steps'"),
        ("1__0 steps", f"every: {WORD}'1__0 steps'"),
        ("5 epochs", f"every: {WORD}'5 epochs'"),
        ("[5]", f"every: {WORD}[5]"),
        ("{}", "every: needs exactly one of steps and tokens"),
        ("{steps: 1, tokens: 1}", "every: needs exactly one of steps and tokens"),
        ("{steps: 0}", "every.steps: must be greater than 0, got 0"),
        ("{stps: 1}", "every.stps: unknown key, did you mean steps?"),
        ("{steps: 1, suites: []}", "every.suites: "),
        ("{steps: 1, suites: [a, c]}", "every.suites[1]: is none of the suites: a, b"),
    ],
)
def test_mistakes_are_told_where_they_stand(tmp_path: Path, every: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, every)
    assert f"r.yaml:9: stages[0].evaluate.{line}" in str(caught.value)


def test_without_suites_it_asks_nothing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"evaluate\.every: has no effect without suites"):
        loaded(tmp_path, "3 steps", overrides=("--stages.one.evaluate.suites", "[]"))


@pytest.mark.parametrize(
    ("every", "stop", "line"),
    [
        ("2 steps", "{}", "stop_when: needs token_accuracy, or metric and patience"),
        ("2 steps", "{metric: a}", "stop_when.metric: goes with patience"),
        ("2 steps", "{token_accuracy: 0.5, patience: 2}", "stop_when.patience: goes with metric"),
        ("2 steps", "{metric: a, patience: 0}", "stop_when.patience: must be greater than 0, got 0"),
    ],
)
def test_stops_that_can_not_be(tmp_path: Path, every: str, stop: str, line: str) -> None:
    with pytest.raises(UsageError) as caught:
        loaded(tmp_path, every, f"    stop_when: {stop}\n")
    assert f"stages[0].{line}" in str(caught.value)


@pytest.mark.parametrize(
    ("every", "metric", "line"),
    [
        ("null", "a", "names no suite that is asked while the stage trains: set `evaluate: {every: 200 steps, "),
        ("{steps: 1, suites: [b]}", "a", "names no suite that is asked while the stage trains: b"),
        ("1 step", "a.pass_at_8", "watches pass_at_1, got 'pass_at_8': set a"),
        ("1 step", "a.pass_at_1", ""),
    ],
)
def test_metrics_that_nothing_gives(tmp_path: Path, every: str, metric: str, line: str) -> None:
    recipe = loaded(tmp_path, every, f"    stop_when: {{metric: {metric}, patience: 2}}\n")
    found = [problem.message for problem in recipe_problems(recipe) if problem.loc[2:3] == ("stop_when",)]
    assert [message.startswith(line) for message in found] == ([True] if line else [])


def test_a_training_is_another_one_by_what_can_end_it(tmp_path: Path) -> None:
    """And by nothing else: what is asked beside it, how fast, and whether at all, changes no weight."""

    def of(every: str, stop: str = "", **more: Any) -> Any:
        return stops(loaded(tmp_path, every, stop and f"    stop_when: {stop}\n", **more).stages[0])

    watched = "{metric: a, patience: 2}"
    assert of("2 steps") is None and of("3 steps", "{token_accuracy: 0.5}") == of("null", "{token_accuracy: 0.5}")
    batch = ("--stages.one.evaluate.suites.a.batch_size", "3")
    assert of("2 steps", watched) == of("{steps: 2, suites: [a]}", watched) == of("2 steps", watched, overrides=batch)
    others = [("3 steps", watched), ("2 tokens", watched), ("2 steps", "{metric: a, patience: 3}")]
    others += [("{steps: 2, max_problems: 1}", watched), ("2 steps", "{metric: b, patience: 2}")]
    assert all(of(*other) != of("2 steps", watched) for other in others)
