"""From a YAML file and overrides to a checked Recipe, with every error at its file and line."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.recipe.error_lines import explain
from sft.recipe.merge import escaped, forget_data_recipes, include_data_recipes, merge_defaults, substitute
from sft.recipe.overrides import apply_override, parse_overrides
from sft.recipe.packaged import find_data_recipe, find_recipe
from sft.recipe.problems import Section
from sft.recipe.schema import Defaults, Given, Recipe
from sft.recipe.yaml_marks import Document, RecipeDumper, parse_document
from sft.utils.errors import UsageError


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or the name of a packaged recipe) and apply `overrides`.

    Order: overrides outside the stages, `defaults` and data recipes merged into every stage, overrides inside the
    stages, `${variables}`. Raises UsageError with one line per problem, each `file:line: key: what to do`.
    """
    file = find_recipe(os.fspath(path))
    text = _text(file)
    document = _parsed(text, file)
    find = functools.cache(_read_data_recipe)
    parsed = parse_overrides(overrides)
    for override in parsed:
        if not override.needs_stages:
            apply_override(document, override)
    merge_defaults(document)
    include_data_recipes(document, find)
    for override in parsed:
        if override.needs_stages:
            apply_override(document, override)
    include_data_recipes(document, find)
    substitute(document)
    forget_data_recipes(document)
    recipe = _validated(document)
    recipe._given = Given(text, tuple(overrides), document)
    return recipe


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with everything filled in; loading it gives an equal recipe, whatever becomes of the files.

    It says every value that isn't its section's default of null.
    """
    return yaml.dump(_plain(recipe), Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


def _plain(value: Any) -> Any:
    """Sections as mappings, and texts escaped, so that nothing in them is taken for a variable."""
    if isinstance(value, Section):
        return {key: _plain(child) for key, child in value.written().items()}
    if isinstance(value, dict):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return escaped(value) if isinstance(value, str) else value


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; --config takes a recipe file or a name that `sft recipes` lists"
        ) from error


def _parsed(text: str, path: Path) -> Document:
    document = parse_document(text, os.fspath(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}:1: a recipe is a mapping of keys such as name, output_dir, model and stages")
    return document


def _read_data_recipe(name: str) -> Document:
    path = find_data_recipe(name)
    return _parsed(_text(path), path)


def _validated(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, document, Recipe))) from None
    # From here on each stage carries what it needs, and nothing is said twice.
    return recipe.model_copy(update={"defaults": Defaults(), "variables": {}})
