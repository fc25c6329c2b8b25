"""`sft report`: the run's page."""

from __future__ import annotations

import argparse

from sft.cli.common import add_recipe_arguments, dry_run, recipe_of
from sft.recipe import RunPaths
from sft.utils.errors import UserError
from sft.utils.files import check_writable
from sft.utils.quiet import quiet_libraries

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options."""
    add_recipe_arguments(parser, stage=False)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Write it from what the run has left so far."""
    recipe = recipe_of(arguments, overrides, as_run=True)
    if arguments.dry_run:
        from sft.run.outlook_of_results import report_outlook

        return dry_run(arguments, recipe, report_outlook(RunPaths(recipe)))
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    paths = RunPaths(recipe)
    if not any(folder.exists() for folder in (paths.root / "stages", paths.root / "eval", paths.prepared)):
        raise UserError(f"there is nothing to report in {paths.root} yet; run `sft run` first")
    check_writable(paths.report, "let it be written to, or copy the run and name the copy with --output_dir")
    from sft.report import write_report

    page = write_report(recipe, paths)
    arguments.told.update(report=str(page))
    print(page)
    return 0
