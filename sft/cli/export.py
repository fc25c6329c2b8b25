"""`sft export`: the folder that goes to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import add_recipe_arguments, dry_run, last_trained, progress_line, quiet_libraries, recipe_of
from sft.errors import UserError
from sft.recipe import Recipe, RunLayout

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, where to, and in what type."""
    add_recipe_arguments(parser)
    parser.add_argument("--out", metavar="DIR", help="folder to write (default: <output_dir>/export)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], help="what weights are stored in (default: model.dtype)"
    )


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Export the model after --stage, or after the last stage trained; push.merge_lora says whether merged."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries()
    out = Path(arguments.out) if arguments.out else None
    print(export_last(recipe, stage=arguments.stage, out=out, dtype=arguments.dtype))
    return 0


def export_last(recipe: Recipe, *, stage: str | None = None, out: Path | None = None, dtype: str | None = None) -> Path:
    """Write the export folder of `stage`, or of the last stage trained. Raises UserError."""
    from sft.hub.export import export

    layout = RunLayout(recipe)
    name = stage or last_trained(recipe)
    if not layout.stage_manifest(name).is_file():
        raise UserError(f"stage {name} isn't trained in {layout.root}; run `sft run` or `sft train` first")
    return export(
        layout.final_dir(name),
        out or layout.export,
        merge_lora=recipe.push.merge_lora,
        dtype=dtype or recipe.model.dtype,
        run_dir=layout.root,
        progress=progress_line,
    )
