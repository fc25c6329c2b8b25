"""`sft run`: the whole recipe."""

from __future__ import annotations

import argparse

from sft.cli.common import (
    add_recipe_arguments,
    add_restart_argument,
    dry_run,
    finish_run,
    quiet_libraries,
    recipe_of,
    show_results,
    start_run,
)

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, and --restart."""
    add_recipe_arguments(parser)
    add_restart_argument(parser)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Stages in order; when the last is done also the export folder, the push (with push.repo_id) and the report."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries()
    from accelerate import PartialState

    from sft.run.chain import run

    layout = start_run(recipe)
    result = run(recipe, only_stage=arguments.stage, restart=arguments.restart)
    if not PartialState().is_main_process:
        return 0
    finish_run(layout)
    show_results(recipe, result)
    if all(layout.stage_manifest(stage.name).is_file() for stage in recipe.stages):
        from sft.cli.export import export_last
        from sft.cli.push import push_exported

        print(f"export: {export_last(recipe, reuse=True)}")
        if recipe.push.repo_id:
            push_exported(recipe)
    from sft.report import write_report

    print(f"report: {write_report(recipe, layout)}")
    return 0
