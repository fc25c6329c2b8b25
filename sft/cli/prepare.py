"""`sft prepare`: from the stages' sources, through the data's steps, to the rows they train on."""

from __future__ import annotations

import argparse
import logging
from typing import TYPE_CHECKING, Any

from sft.cli.common import (
    add_recipe_arguments,
    console,
    dry_run,
    prepare_with_progress,
    recipe_of,
    stages_of,
)
from sft.recipe import Recipe, RunPaths, Stage
from sft.utils.errors import UserError
from sft.utils.files import atomic_open
from sft.utils.quiet import quiet_libraries

if TYPE_CHECKING:
    from sft.data.prepare import PreparedStage

TAKES_OVERRIDES = True
PARTS = ("data",)
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
    parser.add_argument("--explain", metavar="ROW", help="tell what each step did with a row: its id, or file:line")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare the stages; a second call only looks them up."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        from sft.run.outlook import outlook

        return dry_run(arguments, recipe, outlook(recipe, arguments.stage, PARTS), PARTS)
    quiet_libraries(RunPaths(recipe).root, debug=arguments.debug)
    from sft.data.look.preview import show_numbers
    from sft.run.checks import check_recipe
    from sft.tokenizers.load import start_tokenizer

    check_recipe(recipe, ("data",), stage=arguments.stage)
    tokenizer = start_tokenizer(recipe.model)
    if arguments.explain is not None:
        return _explain(recipe, stages_of(recipe, arguments), tokenizer, arguments)
    for stage in stages_of(recipe, arguments):
        prepared = prepare_with_progress(recipe, stage, tokenizer, arguments.engine)
        show_numbers(prepared, console(), f"{recipe.name}: {stage.name}")
        _draw(prepared)
        arguments.told.setdefault("stages", {})[stage.name] = _told(prepared)
    if arguments.clean:
        _clean(recipe, tokenizer)
    return 0


def _told(prepared: PreparedStage) -> dict[str, Any]:
    """What became of the rows, and the rows to train on."""
    names = ("inputs", "steps", "funnel", "rows", "documents", "packs", "tokens", "supervised_tokens")
    found = {name: prepared.manifest[name] for name in names}
    held_out = prepared.validation.manifest["documents"] if prepared.validation else 0
    return {"folder": str(prepared.path), **found, "held_out_documents": held_out}


def _explain(recipe: Recipe, stages: list[Stage], tokenizer: Any, arguments: argparse.Namespace) -> int:
    """Tell a row's story in every stage that knows it, also where preparing fails: it may be why."""
    from sft.data.look.explain import story, story_so_far, tell
    from sft.data.prepare import passes_there

    told = False
    for stage in stages:
        title = f"{recipe.name}: {stage.name}"
        try:
            prepared = prepare_with_progress(recipe, stage, tokenizer, arguments.engine)
            lines = list(story(prepared, arguments.explain))
        except UserError:
            tell(story_so_far(passes_there(recipe, stage, tokenizer), arguments.explain), console(), title)
            raise
        arguments.told.setdefault("stages", {})[stage.name] = {"story": lines}
        told = tell(lines, console(), title) or told
    if not told:
        raise UserError(
            f"No row of these stages has the id or the place (file:line) {arguments.explain!r}; `sft preview` shows "
            "ids."
        )
    if arguments.clean:
        _clean(recipe, tokenizer)
    return 0


def _clean(recipe: Recipe, tokenizer: Any) -> None:
    from sft.data.prepare import clean, prepared_root

    freed = clean(recipe, tokenizer)
    console().print(f"removed from {prepared_root(recipe)}: {freed / 1e9:.2f} GB", markup=False, soft_wrap=True)


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
