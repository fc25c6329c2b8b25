"""`sft train`: the training of the stages alone."""

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
from sft.recipe import RunPaths
from sft.utils.quiet import quiet_libraries

TAKES_OVERRIDES = True
PARTS = ("data", "training")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, --restart and --num_processes."""
    add_recipe_arguments(parser)
    add_restart_argument(parser)
    add_processes_argument(parser)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare and train; nothing is evaluated."""
    recipe = recipe_for_all(arguments, overrides)
    if arguments.dry_run:
        from sft.run.outlook import outlook
        from sft.run.placement import processes

        count = processes(arguments.num_processes)
        plan = outlook(recipe, arguments.stage, PARTS, restart=arguments.restart, processes=count)
        return dry_run(arguments, recipe, plan, PARTS, processes=count)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.chain import train
    from sft.run.restart import is_over
    from sft.utils.distributed import is_main

    result = train(recipe, only_stage=arguments.stage, restart=arguments.restart)
    is_over(RunPaths(recipe))
    if is_main():
        show_results(recipe, result)
        arguments.told.update(results_told(recipe, result))
    return 0
