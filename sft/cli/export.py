"""`sft export`: the folder that goes to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import add_recipe_arguments, dry_run, file_path, recipe_of
from sft.recipe import RunPaths
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, where to, and in what type."""
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=file_path, metavar="DIR", help="folder to write (default: <output_dir>/export)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="what weights are stored in (default: model.dtype)"
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export the model after --stage, or after the last stage trained; push.merge_lora says whether merged."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.publish import export_stage

    out = Path(arguments.out) if arguments.out else None
    paths = RunPaths(recipe)
    print(export_stage(paths, stage=arguments.stage, out=out, dtype=arguments.dtype, progress=say))
    return 0
