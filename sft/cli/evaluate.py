"""`sft eval`: held-out problems, answered and checked."""

from __future__ import annotations

import argparse

from sft.cli.common import add_recipe_arguments, check_model, dry_run, recipe_for_all, show_evaluations
from sft.recipe import RunPaths
from sft.utils.distributed import alike
from sft.utils.errors import UsageError, UserError
from sft.utils.quiet import quiet_libraries

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, and which model."""
    add_recipe_arguments(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--start", action="store_true", help="evaluate the model that the run starts from")
    which.add_argument("--model", metavar="PATH", help="evaluate this folder or Hub model on the stage's suites")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Evaluate a stage's model (default: every stage that is trained), the start, or another model."""
    recipe = recipe_for_all(arguments, overrides)
    if arguments.start and arguments.stage not in (None, recipe.stages[0].name):
        raise UsageError("--start asks the suites of the first stage: leave --stage out")
    if arguments.model is not None:
        check_model(arguments.model)
    if arguments.dry_run:
        from sft.run.outlook_of_results import eval_outlook

        plan = eval_outlook(RunPaths(recipe), start=arguments.start, model=arguments.model, stage=arguments.stage)
        return dry_run(recipe, plan, ("suites",), arguments.stage)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.evaluation import evaluate_other, evaluate_points

    paths = RunPaths(recipe)
    if arguments.model:
        results = evaluate_other(paths, arguments.model, arguments.stage)
    else:
        results = evaluate_points(paths, start=arguments.start, stage=arguments.stage)
    if not any(results.values()):
        with alike():
            text = "the recipe has no suites; add `evaluate: {suites: [...]}` to a stage"
            raise UserError(f"nothing was evaluated: {text}")
    show_evaluations(results)
    return 0
