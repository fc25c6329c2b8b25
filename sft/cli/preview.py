"""`sft preview`: rows as they will be trained on."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import (
    add_recipe_arguments,
    dry_run,
    positive,
    prepare_with_progress,
    quiet_libraries,
    recipe_of,
    stages_of,
    starting_tokenizer,
)

TAKES_OVERRIDES = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, how many rows, and whether as a page."""
    add_recipe_arguments(parser)
    parser.add_argument("--rows", type=positive, default=2, metavar="N", help="rows to show of each stage (default 2)")
    parser.add_argument("--html", metavar="FILE", help="write a page instead (with several stages: FILE-STAGE)")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Prepare where needed, then show."""
    recipe = recipe_of(arguments, overrides)
    if arguments.dry_run:
        return dry_run(recipe)
    quiet_libraries()
    from sft.data.preview import show
    from sft.data.preview_html import write_page

    tokenizer = starting_tokenizer(recipe)
    stages = stages_of(recipe, arguments)
    for stage in stages:
        prepared = prepare_with_progress(recipe, stage, tokenizer)
        title = f"{recipe.name}: {stage.name}"
        if arguments.html is None:
            show(prepared, tokenizer, title=title, rows=arguments.rows)
            continue
        page = Path(arguments.html)
        if len(stages) > 1:
            page = page.with_name(f"{page.stem}-{stage.name}{page.suffix}")
        write_page(prepared, tokenizer, page, title=title, rows=arguments.rows)
        print(page)
    return 0
