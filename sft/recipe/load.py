"""From a YAML file and overrides to a checked Recipe, with every error at its file and line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sft.recipe.error_lines import explain
from sft.recipe.merge import include_data_recipes, merge_defaults, substitute
from sft.recipe.overrides import apply_override, parse_overrides
from sft.recipe.packaged import find_data_recipe, find_recipe
from sft.recipe.schema import Defaults, Recipe
from sft.recipe.yaml_marks import Document, RecipeDumper, parse_document
from sft.utils.errors import UsageError


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or the name of a packaged recipe) and apply `overrides`.

    Order: overrides outside the stages, `defaults` and data recipes merged into every stage, overrides inside the
    stages, `${variables}`. Raises UsageError with one line per problem, each `file:line: key: what to do`.
    """
    document = _read(find_recipe(os.fspath(path)))
    parsed = parse_overrides(overrides)
    for override in parsed:
        if not override.needs_stages:
            apply_override(document, override)
    merge_defaults(document)
    include_data_recipes(document, _read_data_recipe)
    for override in parsed:
        if override.needs_stages:
            apply_override(document, override)
    include_data_recipes(document, _read_data_recipe)
    substitute(document)
    return _validated(document)


def resolved_yaml(recipe: Recipe) -> str:
    """The recipe as YAML with everything filled in; loading it gives the same recipe."""
    data = _without_none(recipe.model_dump(exclude={"variables", "defaults"}))
    return yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True, width=110)


def _read(path: Path) -> Document:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; --config takes a recipe file or a name that `sft recipes` lists"
        ) from error
    document = parse_document(text, os.fspath(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}:1: a recipe is a mapping of keys such as name, output_dir, model and stages")
    return document


def _read_data_recipe(name: str) -> Document:
    return _read(find_data_recipe(name))


def _validated(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, document, Recipe))) from None
    # From here on each stage carries what it needs, and nothing is said twice.
    return recipe.model_copy(update={"defaults": Defaults(), "variables": {}})


def _without_none(data: dict[str, Any]) -> dict[str, Any]:
    """Leave out keys that aren't set. Under `train` a null is a setting."""
    result: dict[str, Any] = {}
    for key, value in data.items():
        if isinstance(value, dict):
            result[key] = value if key in ("train", "config") else _without_none(value)
        elif isinstance(value, list):
            result[key] = [_without_none(item) if isinstance(item, dict) else item for item in value]
        elif value is not None:
            result[key] = value
    return result
