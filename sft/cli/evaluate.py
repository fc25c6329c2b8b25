"""`sft eval`: held-out problems, answered and checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import (
    add_recipe_arguments,
    dry_run,
    quiet_libraries,
    recipe_of,
    show_evaluations,
)
from sft.recipe import Recipe, RunPaths
from sft.utils.errors import UserError

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, and which model."""
    add_recipe_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--start", action="store_true", help="evaluate the model that the run starts from")
    which.add_argument("--model", metavar="PATH", help="evaluate this folder or Hub model on the stage's suites")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Evaluate a stage's model (default: every stage that is trained), the start, or another model."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries()
    if arguments.model:
        results = _other_model(recipe, arguments.model, arguments.stage)
    else:
        from sft.run.chain import evaluate_point

        layout = RunPaths(recipe)
        results = {point or "start": evaluate_point(layout, point) for point in _points(recipe, arguments)}
    if not any(results.values()):
        raise UserError("nothing was evaluated: the recipe has no suites; add `evaluate: {suites: [...]}` to a stage")
    show_evaluations(results)
    return 0


def _points(recipe: Recipe, arguments: argparse.Namespace) -> list[str | None]:
    """The stages meant; None is the start."""
    if arguments.start:
        return [None]
    if arguments.stage:
        return [arguments.stage]
    layout = RunPaths(recipe)
    trained: list[str | None] = [stage.name for stage in recipe.stages if layout.stage_manifest(stage.name).is_file()]
    if not trained:
        raise UserError(
            f"no stage is trained in {layout.root}; `sft run` trains, `--start` evaluates the starting model"
        )
    return trained


def _other_model(recipe: Recipe, name: str, stage: str | None) -> dict[str, dict[str, object]]:
    """Suites of `stage` (default: the last one) on a model that isn't the run's."""
    from sft.cli.common import load_any_model
    from sft.evaluate import evaluate

    owner = recipe.stage(stage) if stage else recipe.stages[-1]
    model, tokenizer = load_any_model(name, recipe.model.trust_remote_code)
    point = f"model-{Path(name).resolve().name if Path(name).exists() else name.replace('/', '--')}"
    folder = RunPaths(recipe).eval_dir(point)
    results = evaluate(model, tokenizer, owner.evaluate, prompt_defaults=owner.data, out_dir=folder, point=point)
    return {point: dict(results)}
