"""`sft export`: the folder that goes to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from sft.cli.common import add_recipe_arguments, dry_run, last_trained, progress_line, quiet_libraries, recipe_of
from sft.recipe import Recipe, RunPaths
from sft.utils.errors import UserError
from sft.utils.files import read_json, sha256_json, write_json

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


def export_last(
    recipe: Recipe, *, stage: str | None = None, out: Path | None = None, dtype: str | None = None, reuse: bool = False
) -> Path:
    """Write the export folder of `stage`, or of the last stage trained. Raises UserError.

    With `reuse`, an export in the run's own folder that is whole and still of this model, recipe and results stays as
    it is, with whatever its model card has been edited to.
    """
    from sft.hub.export import export

    layout = RunPaths(recipe)
    name = stage or last_trained(recipe)
    if not layout.stage_manifest(name).is_file():
        raise UserError(f"stage {name} isn't trained in {layout.root}; run `sft run` or `sft train` first")
    folder = out or layout.export
    wanted = _contents(layout, name, dtype or recipe.model.dtype)
    note = layout.root / "export.json"
    if reuse and out is None and _whole(folder) and note.is_file() and read_json(note) == wanted:
        return folder
    if out is None:
        note.unlink(missing_ok=True)
    export(
        layout.final_dir(name),
        folder,
        merge_lora=recipe.push.merge_lora,
        dtype=wanted["dtype"],
        run_dir=layout.root,
        progress=progress_line,
    )
    if out is None:
        write_json(note, wanted)
    return folder


def _contents(layout: RunPaths, stage: str, dtype: str) -> dict[str, Any]:
    """What an export's content follows from."""
    from sft.hub.provenance import run_record

    return {
        "stage": stage,
        "key": read_json(layout.stage_manifest(stage))["key"],
        "dtype": dtype,
        "merge_lora": layout.recipe.push.merge_lora,
        "run": sha256_json(run_record(layout.root)),
    }


def _whole(folder: Path) -> bool:
    """Whether `folder` is an export whose files are all what was exported."""
    from sft.hub.folder import list_files

    try:
        list_files(folder)
    except UserError:
        return False
    return True
