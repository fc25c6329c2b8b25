"""`sft eval`: held-out problems, answered and checked."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.cli.common import (
    add_processes_argument,
    add_recipe_arguments,
    check_model,
    dry_run,
    file_path,
    positive,
    recipe_and_keys,
    recipe_for_all,
    recipe_of,
    show_evaluations,
)
from sft.recipe import RunPaths
from sft.recipe.overrides import split_overrides
from sft.utils.distributed import alike, decide
from sft.utils.errors import UsageError, UserError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe import Recipe, Stage
    from sft.recipe.suites import Chosen

TAKES_OVERRIDES = True
_JUDGED_BY = r"output_dir|variables\..+|(defaults|stages\.[^.]+)\.evaluate(\.verify_(timeout|workers))?"
"""The keys that answers are found and judged by again."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, which model, and which suites."""
    add_recipe_arguments(parser)
    add_processes_argument(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--start", action="store_true", help="evaluate the model that the run starts from")
    which.add_argument(
        "--model", metavar="PATH", help="evaluate this folder or Hub model; with --suite it needs no recipe"
    )
    parser.add_argument(
        "--suite",
        metavar="NAME",
        action="append",
        default=[],
        help="this suite alone (again: and this one): the stage's own, a packaged one (see `sft recipes`) or a file",
    )
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N problems of each suite")
    parser.add_argument("--samples", type=positive, metavar="K", help="K answers to each problem")
    parser.add_argument("--output_dir", type=file_path, metavar="DIR", help="where the results go")
    parser.add_argument(
        "--rescore", action="store_true", help="judge recorded answers again, without a model: of RECIPE or a folder"
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="--model: run the code it comes with")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Evaluate a stage's model (default: every stage that is trained), the start, or another model."""
    if arguments.model is not None:
        check_model(arguments.model)
    if arguments.rescore:
        return _rescore(arguments, overrides)
    recipe, keys = recipe_and_keys(arguments.config, overrides)
    if recipe is None and arguments.suite:
        return _alone(arguments, keys)
    return _of_recipe(arguments, overrides)


def _chosen(arguments: argparse.Namespace, *, suites: bool = True) -> Chosen:
    from sft.recipe.suites import Chosen

    return Chosen(tuple(arguments.suite) if suites else (), arguments.limit, arguments.samples)


def _of_recipe(arguments: argparse.Namespace, overrides: list[str]) -> int:
    if arguments.output_dir is not None:
        overrides = [*overrides, "--output_dir", arguments.output_dir]
    if arguments.trust_remote_code:
        overrides = [*overrides, "--model.trust_remote_code", "true"]
    recipe, chosen = recipe_for_all(arguments, overrides), _chosen(arguments)
    _check_start(arguments, recipe)
    if arguments.dry_run:
        from sft.run.checks import check_suites
        from sft.run.outlook_of_results import eval_outlook

        for owner in _asked(arguments, recipe) if chosen else ():
            check_suites(chosen.of(owner.evaluate), rehearsal=True)
        plan = eval_outlook(
            RunPaths(recipe), start=arguments.start, model=arguments.model, stage=arguments.stage, chosen=chosen
        )
        return dry_run(arguments, recipe, plan, () if chosen else ("suites",))
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.evaluation import evaluate_other, evaluate_points

    paths = RunPaths(recipe)
    if arguments.model:
        results = evaluate_other(paths, arguments.model, arguments.stage, chosen)
    else:
        results = evaluate_points(paths, start=arguments.start, stage=arguments.stage, chosen=chosen)
    if not any(results.values()):
        with alike():
            text = "the recipe has no suites; add `evaluate: {suites: [...]}` to a stage"
            raise UserError(f"nothing was evaluated: {text}")
    return _show(arguments, results)


def _asked(arguments: argparse.Namespace, recipe: Recipe) -> list[Stage]:
    """The stages whose suites are meant: of the start the first one's, of another model the last one's."""
    if arguments.stage is not None:
        return [recipe.stage(arguments.stage)]
    return recipe.stages[:1] if arguments.start else recipe.stages[-1:] if arguments.model else recipe.stages


def _check_start(arguments: argparse.Namespace, recipe: Recipe | None) -> None:
    """Raise UsageError for a stage beside --start that isn't known to be the first one."""
    first = None if recipe is None else recipe.stages[0].name
    if arguments.start and arguments.stage not in (None, first):
        raise UsageError("--start asks the suites of the first stage: leave --stage out")


def _alone(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Suites on a model, without a recipe."""
    if arguments.model is None or arguments.stage is not None:
        raise UsageError("--suite without a recipe needs --model PATH, and no --stage; see `sft eval --help`")
    from sft.recipe.suites import load_suites

    section = decide(lambda: _chosen(arguments, suites=False).of(load_suites(arguments.suite, overrides)))
    if arguments.dry_run:
        from sft.run.checks import check_suites
        from sft.run.outlook_of_results import suites_outlook

        check_suites(section, rehearsal=True)
        plan = list(suites_outlook(section, f"the model {arguments.model}"))
        for line in plan:
            say(line)
        arguments.told.update(dry_run=True, plan=plan)
        return 0
    quiet_libraries(debug=arguments.debug)
    from sft.run.evaluation import evaluate_alone

    out = Path(arguments.output_dir) if arguments.output_dir else None
    label, trust = _chosen(arguments).label, arguments.trust_remote_code
    return _show(arguments, evaluate_alone(arguments.model, section, out, label=label, trust_remote_code=trust))


def _rescore(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Recorded answers of a run, or in a folder, judged again."""
    if arguments.dry_run:
        raise UsageError("--dry_run has no effect with --rescore: leave one out")
    name, keys = recipe_and_keys(arguments.config, overrides)
    options = ("model", "limit", "samples", "num_processes", "trust_remote_code")
    no_use = [option for option in options if getattr(arguments, option) not in (None, False)]
    if name is not None and not Path(name).is_dir():
        no_use += [key for key, _ in split_overrides(keys) if not re.fullmatch(_JUDGED_BY, key)]
    if no_use:
        raise UsageError(f"--{no_use[0]} has no effect with --rescore, which judges the answers that are there")
    folder = arguments.output_dir if name is None else name if Path(name).is_dir() else None
    recipe = None
    if folder is None:
        if arguments.output_dir is not None:
            overrides = [*overrides, "--output_dir", arguments.output_dir]
        recipe = recipe_of(arguments, overrides, as_run=True)
        root = RunPaths(recipe).root
    elif keys or (name is not None and arguments.output_dir is not None):
        raise UsageError(f"{keys[0] if keys else '--output_dir'} has no effect: {folder} is a folder of results")
    else:
        root = Path(folder)
    _check_start(arguments, recipe)
    if not root.is_dir():
        raise UsageError(f"{root}: no such folder; --rescore takes a run's recipe, or a folder of results")
    points = ["start"] if arguments.start else [arguments.stage] if arguments.stage else None
    from sft.run.rescoring import rescore_all

    return _show(arguments, decide(lambda: rescore_all(root, recipe=recipe, points=points, suites=arguments.suite)))


def _show(arguments: argparse.Namespace, results: dict[str, dict[str, Any]]) -> int:
    arguments.told.update(results)
    show_evaluations(results)
    return 0
