"""`sft export`: the folder that goes to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import add_recipe_arguments, dry_run, file_path, recipe_of
from sft.recipe import RunPaths
from sft.utils.errors import UsageError
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, where to, and in what type."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--model", metavar="PATH", help="export this model or adapter folder instead of a recipe's; goes with --out"
    )
    parser.add_argument("--out", type=file_path, metavar="DIR", help="folder to write (default: <output_dir>/export)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="what weights are stored in (default: model.dtype)"
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export the model after --stage, or after the last stage trained; push.merge_lora says whether merged."""
    if arguments.model is not None:
        return _folder(arguments, overrides)
    recipe = recipe_of(arguments, overrides, as_run=True)
    out = Path(arguments.out) if arguments.out else None
    if arguments.dry_run:
        from sft.run.outlook_of_results import export_outlook

        return dry_run(
            arguments, recipe, export_outlook(RunPaths(recipe), stage=arguments.stage, out=out, dtype=arguments.dtype)
        )
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.run.publish import export_stage

    paths = RunPaths(recipe)
    return _show(arguments, export_stage(paths, stage=arguments.stage, out=out, dtype=arguments.dtype, progress=say))


def _show(arguments: argparse.Namespace, folder: Path) -> int:
    arguments.told.update(folder=str(folder), files=sorted(path.name for path in folder.iterdir()))
    print(folder)
    return 0


def _folder(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export the model of a folder, an adapter merged into its base."""
    if arguments.config or arguments.stage or arguments.dry_run or overrides:
        word = overrides[0] if overrides else "--config, --stage or --dry_run"
        raise UsageError(f"{word} goes with a recipe; --model PATH takes --out and --dtype alone")
    if arguments.out is None:
        raise UsageError("--model PATH needs --out DIR, the folder to write")
    if not Path(arguments.model).is_dir():
        raise UsageError(f"--model: no model folder at {arguments.model}")
    quiet_libraries()
    from sft.hub.export import export

    return _show(arguments, export(arguments.model, arguments.out, dtype=arguments.dtype, progress=say))
