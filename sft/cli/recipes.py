"""`sft recipes`: what comes with the tool."""

from __future__ import annotations

import argparse
from pathlib import Path

from sft.cli.common import file_path
from sft.utils.errors import UsageError, UserError
from sft.utils.files import write_text

TAKES_OVERRIDES = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`sft recipes`, `show NAME`, `copy NAME FILE [--force]`, `keys [SECTION]`, `schema`."""
    actions = ["list", "show", "copy", "keys", "schema"]
    text = "list (default), show or copy a recipe; keys: what a section takes; schema: JSON Schema for editors"
    parser.add_argument("action", nargs="?", choices=actions, default="list", help=text)
    parser.add_argument(
        "name", nargs="?", help="a recipe's, data recipe's or suite's name as listed; keys: a section, as train"
    )
    parser.add_argument("file", nargs="?", type=file_path, help="copy: the file to write")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--data", action="store_true", help="show, copy: the data recipe, where a recipe is called so")
    which.add_argument("--suite", action="store_true", help="show, copy: the suite, where a recipe is called so")
    parser.add_argument("--force", action="store_true", help="copy: overwrite the file")


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """List, print, copy or describe."""
    if arguments.action == "list":
        return _list(arguments)
    if arguments.action == "keys":
        return _keys(arguments)
    if arguments.action == "schema":
        import json

        from sft.recipe.describe import json_schema

        arguments.told.update(json_schema())
        print(json.dumps(arguments.told, indent=1))
        return 0
    if arguments.name is None:
        raise UsageError(f"say which recipe: sft recipes {arguments.action} NAME; `sft recipes` lists them")
    path, use = _find(arguments.name, arguments.data, arguments.suite)
    text = path.read_text(encoding="utf-8")
    if arguments.action == "show":
        arguments.told.update(name=arguments.name, file=str(path), text=text)
        print(text, end="")
        return 0
    target = Path(arguments.file or f"{arguments.name.replace('/', '-')}.yaml")
    if target.is_dir():
        target = target / f"{arguments.name.replace('/', '-')}.yaml"
    if target.exists() and not arguments.force:
        raise UserError(f"{target} exists; give another name, or --force to overwrite it")
    write_text(target, text)
    arguments.told.update(name=arguments.name, file=str(target))
    print(f"{target}: edit it, then {use.format(target)}")
    return 0


def _find(name: str, data: bool, suite: bool) -> tuple[Path, str]:
    """The file of a recipe, or of a data recipe or suite, and how it is used."""
    from sft.recipe.packaged import (
        find_data_recipe,
        find_recipe,
        find_suite,
        list_data_recipes,
        list_recipes,
        list_suites,
    )

    recipes, data_recipes = ({entry.name for entry in entries} for entries in (list_recipes(), list_data_recipes()))
    if data or (not suite and name not in recipes and name in data_recipes):
        return find_data_recipe(name), "name it in a stage: `data: {{recipe: {}}}`"
    if suite or (name not in recipes and name in {entry.name for entry in list_suites()}):
        return find_suite(name), "name it in a stage: `evaluate: {{suites: [{}]}}`, or `sft eval --suite` it"
    return find_recipe(name), "`sft run --config {}`"


def _keys(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from sft.cli.common import console
    from sft.recipe.describe import find_section, keys_of, sections

    path, section = find_section(arguments.name or "")
    table = Table(box=None, pad_edge=False, title=f"keys of {path or 'a recipe'}", title_justify="left")
    for heading in ("key", "what it may be", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "key", overflow="fold")
    for key in keys_of(section):
        table.add_row(*key)
    console().print(table)
    inside = [other for other in sections() if other.startswith(f"{path}.".lstrip(".")) and other != path]
    if inside:
        below = path.count(".") + (1 if path else 0)
        names = dict.fromkeys(".".join(other.split(".")[below : below + 1]) for other in inside)
        print(f"\nsections inside: {', '.join(names)}; `sft recipes keys SECTION` shows one")
    words = ("key", "type", "default", "meaning")
    keys = [dict(zip(words, key, strict=True)) for key in keys_of(section)]
    arguments.told.update(section=path, keys=keys, sections=inside)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    from rich.table import Table

    from sft.cli.common import console
    from sft.recipe.packaged import list_data_recipes, list_recipes, list_suites

    lists = {"recipe": list_recipes(), "data recipe": list_data_recipes(), "suite": list_suites()}
    for heading, entries in lists.items():
        table = Table(box=None, pad_edge=False)
        table.add_column(heading, style="bold", no_wrap=True)
        table.add_column("what it is")
        for entry in entries:
            table.add_row(entry.name, entry.title)
        console().print(table)
        print()
        arguments.told[f"{heading}s".replace(" ", "_")] = [
            {"name": entry.name, "title": entry.title} for entry in entries
        ]
    print("sft run NAME runs one; sft recipes copy NAME my.yaml hands one out; sft recipes keys says what it may hold.")
    return 0
