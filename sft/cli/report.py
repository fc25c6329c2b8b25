"""`sft report`: the run's page."""

from __future__ import annotations

import argparse

from sft.cli.common import add_recipe_arguments, dry_run, recipe_of
from sft.recipe import RunPaths
from sft.utils.quiet import quiet_libraries

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options."""
    add_recipe_arguments(parser, stage=False)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write it from what the run has left so far."""
    recipe = recipe_of(arguments, overrides, as_run=True)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.report import write_report

    print(write_report(recipe, RunPaths(recipe)))
    return 0
