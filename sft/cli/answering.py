"""What the verbs share that answer: which model, of a run or by its name."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from sft.cli.common import check_model, recipe_and_keys, recipe_of
from sft.recipe import RunPaths
from sft.utils.errors import UsageError
from sft.utils.say import say

Load = Callable[[], tuple[Any, Any]]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """`--config`, `--stage`, `--model` and `--trust_remote_code`."""
    parser.add_argument(
        "--config", metavar="RECIPE", help="recipe whose trained model answers; may stand without --config"
    )
    parser.add_argument("--stage", metavar="NAME", help="the model after this stage (default: the last one trained)")
    parser.add_argument(
        "--model", metavar="PATH", help="a model or adapter folder (an export, a stage) or Hub id instead of --config"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="--model: run the code it comes with")


def check_which_model(arguments: argparse.Namespace, overrides: list[str]) -> list[str]:
    """Settle --config, and return the keys that are the recipe's. Raises UsageError unless one model is named."""
    if arguments.model is None:
        arguments.config, overrides = recipe_and_keys(arguments.config, overrides)
    if (arguments.config is None) == (arguments.model is None):
        raise UsageError("say which model answers: --config RECIPE or --model PATH")
    if arguments.model is not None and overrides:
        raise UsageError(f"unknown argument {overrides[0]!r}; keys of a recipe go with --config")
    return overrides


def named_model(arguments: argparse.Namespace, overrides: list[str]) -> tuple[str, Load]:
    """What the model is called that is named, as on the command line or as its recipe, and what loads it with its
    tokenizer. Raises UserError where it is known here that there is none."""
    name = arguments.model
    if name is not None:
        check_model(name)
        return name, lambda: _load_named(name, arguments.trust_remote_code)
    from sft.run.publish import taken_stage

    recipe = recipe_of(arguments, overrides, as_run=True)
    paths = RunPaths(recipe)
    stage = taken_stage(paths, arguments.stage, say)
    return recipe.name, lambda: _load_stage(paths, stage)


def _load_named(name: str, trust_remote_code: bool) -> tuple[Any, Any]:
    from sft.run.named import load_named

    return load_named(name, trust_remote_code)


def _load_stage(paths: RunPaths, stage: str) -> tuple[Any, Any]:
    from sft.models.load import on_device
    from sft.train.answering import answering_precision
    from sft.train.handover import load_stage_model

    dtype = answering_precision(paths, paths.recipe.stage(stage).evaluate).dtype
    model, tokenizer = load_stage_model(paths, stage, dtype=dtype)
    return on_device(model), tokenizer
