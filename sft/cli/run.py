"""`sft run`: the whole recipe."""

from __future__ import annotations

import argparse

from sft.cli.common import (
    add_processes_argument,
    add_recipe_arguments,
    add_restart_argument,
    dry_run,
    recipe_for_all,
    results_told,
    show_results,
)
from sft.recipe import Recipe, RunPaths
from sft.utils.errors import UsageError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, --restart and --num_processes."""
    add_recipe_arguments(parser)
    add_restart_argument(parser)
    add_processes_argument(parser)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Stages in order; when the last is done also the export folder, the push (with push.repo_id) and the report."""
    recipe = recipe_for_all(arguments, overrides)
    if arguments.dry_run:
        from sft.run.outlook import ALL, outlook
        from sft.run.placement import processes

        count = processes(arguments.num_processes)
        plan = outlook(recipe, arguments.stage, restart=arguments.restart, processes=count)
        return dry_run(arguments, recipe, plan, ALL, processes=count)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.utils.distributed import decide, is_main

    if not arguments.stage:
        decide(lambda: _check_push(recipe))
    from sft.run.chain import run
    from sft.run.restart import is_over

    result = run(recipe, only_stage=arguments.stage, restart=arguments.restart)
    if not is_main():
        return 0
    show_results(recipe, result)
    told, paths = arguments.told, RunPaths(recipe)
    told.update(results_told(recipe, result))
    if all(paths.stage_manifest(stage.name).is_file() for stage in recipe.stages):
        from sft.cli.push import show_push
        from sft.run.publish import export_stage, push_export

        told["export"] = str(export_stage(paths, reuse=True, progress=say))
        print(f"export: {told['export']}")
        if recipe.push.repo_id:
            told["push"] = show_push(push_export(paths, progress=say))
    from sft.report import write_report

    told["report"] = str(write_report(recipe, paths))
    print(f"report: {told['report']}")
    is_over(paths)
    return 0


def _check_push(recipe: Recipe) -> None:
    """Raise UsageError where what will have been trained couldn't be pushed, as far as that is known now."""
    from sft.run.publish import push_obstacle

    if recipe.push.repo_id and (why := push_obstacle(recipe.push.repo_id, publish=not recipe.push.private)):
        place = recipe.place(("push", "repo_id"))
        raise UsageError(f"{place}: {why}; or leave the push for later with --push.repo_id null")
