"""`sft recipes`: what comes with the tool."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import file_path
from sft.utils.errors import UsageError, UserError
from sft.utils.files import write_text

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sft recipes`, `sft recipes show NAME`, `sft recipes copy NAME FILE [--force]`."""
    parser.add_argument("action", nargs="?", choices=["list", "show", "copy"], default="list")
    parser.add_argument("name", nargs="?", help="a recipe's name as listed")
    parser.add_argument("file", nargs="?", type=file_path, help="copy: the file to write")
    parser.add_argument("--force", action="store_true", help="copy: overwrite the file")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """List, print or copy."""
    if arguments.action == "list":
        return _list()
    if arguments.name is None:
        raise UsageError(f"say which recipe: sft recipes {arguments.action} NAME; `sft recipes` lists them")
    from sft.recipe.packaged import find_recipe

    text = find_recipe(arguments.name).read_text(encoding="utf-8")
    if arguments.action == "show":
        print(text, end="")
        return 0
    target = Path(arguments.file or f"{arguments.name.replace('/', '-')}.yaml")
    if target.is_dir():
        target = target / f"{arguments.name.replace('/', '-')}.yaml"
    if target.exists() and not arguments.force:
        raise UserError(f"{target} exists; give another name, or --force to overwrite it")
    write_text(target, text)
    print(f"{target}: edit it, then `sft run --config {target}`")
    return 0


def _list() -> int:
    from rich.table import Table

    from sft.cli.common import console
    from sft.recipe.packaged import list_data_recipes, list_recipes

    for heading, entries in (("recipe", list_recipes()), ("data recipe", list_data_recipes())):
        table = Table(box=None, pad_edge=False)
        table.add_column(heading, style="bold", no_wrap=True)
        table.add_column("what it is")
        for entry in entries:
            table.add_row(entry.name, entry.title)
        console().print(table)
        print()
    print("sft run --config NAME runs one; sft recipes copy NAME my.yaml hands one out to edit.")
    return 0
