"""`sft prepare`: from the stages' sources, through the data's steps, to the rows they train on."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING

from sft.cli.common import (
    add_recipe_arguments,
    console,
    dry_run,
    prepare_with_progress,
    recipe_of,
    stages_of,
)
from sft.recipe import RunPaths
from sft.utils.files import atomic_open
from sft.utils.quiet import quiet_libraries

if TYPE_CHECKING:
    from sft.data.prepare import PreparedStage

TAKES_OVERRIDES = True
FIGURES = "figures"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, who works on the steps, and whose story to tell."""
    add_recipe_arguments(parser)
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="where the data's steps run: processes of this machine, or the Ray cluster that RAY_ADDRESS names",
    )
    parser.add_argument("--clean", action="store_true", help="then remove what other settings have prepared")
    parser.add_argument("--explain", metavar="ROW_ID", help="tell what each step did with one row")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare the stages; a second call only looks them up."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.data.look.preview import show_numbers
    from sft.run.checks import check_recipe
    from sft.tokenizers.load import start_tokenizer

    check_recipe(recipe, ("data",), stage=arguments.stage)
    tokenizer = start_tokenizer(recipe.model)
    told = False
    for stage in stages_of(recipe, arguments):
        prepared = prepare_with_progress(recipe, stage, tokenizer, arguments.engine)
        if arguments.explain is not None:
            from sft.data.look.explain import tell

            told = tell(prepared, arguments.explain, console(), f"{recipe.name}: {stage.name}") or told
            continue
        show_numbers(prepared, console(), f"{recipe.name}: {stage.name}")
        _draw(prepared)
    if arguments.clean:
        from sft.data.prepare import clean, prepared_root

        freed = clean(recipe, tokenizer)
        console().print(f"removed from {prepared_root(recipe)}: {freed / 1e9:.2f} GB", markup=False, soft_wrap=True)
    if arguments.explain is not None and not told:
        from sft.utils.errors import UserError

        raise UserError(f"No row of these stages has the id {arguments.explain!r}; `sft preview` shows ids.")
    return 0


def _draw(prepared: PreparedStage) -> None:
    """The figures of the data's steps, beside the rows; none where there are no steps."""
    from sft.report.funnel_figures import draw_data

    figures, folder = draw_data(prepared.manifest), prepared.path / FIGURES
    if not figures:
        return
    try:
        for name, (_, png, _) in figures.items():
            with atomic_open(folder / f"{name}.png", "wb") as handle:
                handle.write(png)
    except OSError as error:  # prepared data may be another's, and read-only
        log.warning("the figures can't be written to %s: %s", folder, error)
        return
    console().print(f"figures: {folder}", markup=False, soft_wrap=True)
