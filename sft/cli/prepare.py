"""`sft prepare`: from the stages' sources to the rows they train on."""

from __future__ import annotations

import argparse

from sft.cli.common import (
    add_recipe_arguments,
    dry_run,
    prepare_with_progress,
    quiet_libraries,
    recipe_of,
    stages_of,
    starting_tokenizer,
)

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options."""
    add_recipe_arguments(parser)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare the stages; a second call only looks them up."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries()
    from sft.data.preview import show

    tokenizer = starting_tokenizer(recipe)
    for stage in stages_of(recipe, arguments):
        prepared = prepare_with_progress(recipe, stage, tokenizer)
        show(prepared, tokenizer, title=f"{recipe.name}: {stage.name}", rows=0)
    return 0
