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
from sft.recipe.merge import (
    escaped,
    forget_names,
    include_data_recipes,
    include_suites,
    merge_defaults,
    substitute,
    substitute_text,
)
from sft.recipe.overrides import Override, apply_override, parse_overrides, tell_defaults
from sft.recipe.packaged import find_data_recipe, find_recipe, find_suite
from sft.recipe.problems import Section, in_file_order
from sft.recipe.schema import Defaults, Given, Recipe
from sft.recipe.yaml_marks import Document, RecipeDumper, parse_document
from sft.utils.errors import UsageError

_RECIPE = "a recipe is a mapping of keys such as name, output_dir, model and stages"


def load_recipe(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe at `path` (a file, or the name of a packaged recipe) and apply `overrides`.

    Order: overrides outside the stages, `defaults`, data recipes and suites merged into every stage, overrides inside
    the stages, `${variables}`. Raises UsageError with one line per problem, each `file:line: key: what to do`.
    """
    file = find_recipe(os.fspath(path))
    text = _text(file)
    parsed = parse_overrides(overrides)
    try:
        recipe, document = _filled(text, file, parsed)
    except UsageError as error:
        raise UsageError(_blamed(str(error), text, file, parsed)) from None
    tell_defaults(document, parsed)
    recipe._given = Given(text, tuple(overrides), document)
    return recipe


def output_dir_of(path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[str, str | None]:
    """(text of the recipe's file, the `output_dir` that it and `overrides` mean), though variables may be missing.

    The folder is None where that can't be told. Raises UsageError for a file that is no recipe.
    """
    file = find_recipe(os.fspath(path))
    text = _text(file)
    document = _parsed(text, file)
    for override in parse_overrides(overrides):
        if not override.needs_stages:
            apply_override(document, override)
    folder = document.value.get("output_dir")
    if not isinstance(folder, str):
        return text, None
    try:
        return text, os.path.expanduser(str(substitute_text(folder, document, ("output_dir",))))
    except UsageError:
        return text, None


def _filled(text: str, file: Path, overrides: Sequence[Override]) -> tuple[Recipe, Document]:
    document = _parsed(text, file)
    find, find_one = functools.cache(_read_data_recipe), functools.cache(read_suite)
    for override in overrides:
        if not override.needs_stages:
            apply_override(document, override)
    merge_defaults(document)
    include_data_recipes(document, find)
    include_suites(document, find_one)
    for override in overrides:
        if override.needs_stages:
            apply_override(document, override)
    include_data_recipes(document, find)
    include_suites(document, find_one)
    substitute(document)
    forget_names(document)
    return _validated(document), document


def _blamed(message: str, text: str, file: Path, overrides: Sequence[Override]) -> str:
    """An error's lines; one that names a line of the file, though an override brought it about, names that too."""
    blamed: dict[str, str] = {}
    before = _problems(text, file, [])
    for count, override in enumerate(overrides, start=1):
        now = _problems(text, file, overrides[:count])
        blamed |= dict.fromkeys(now - before, f"--{override.key}: ")
        before = now
    lines = (line if line.startswith("--") else f"{blamed.get(line, '')}{line}" for line in message.splitlines())
    return "\n".join(in_file_order(lines))


def _problems(text: str, file: Path, overrides: Sequence[Override]) -> set[str]:
    """The lines of the error that the recipe gives with these overrides."""
    try:
        _filled(text, file, overrides)
    except UsageError as error:
        return set(str(error).splitlines())
    return set()


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


def _parsed(text: str, path: Path, what: str = _RECIPE) -> Document:
    document = parse_document(text, os.fspath(path))
    if not isinstance(document.value, dict):
        raise UsageError(f"{path}:1: {what}")
    return document


def _read_data_recipe(name: str) -> Document:
    path = find_data_recipe(name)
    return _parsed(_text(path), path)


def read_suite(name: str) -> Document:
    """A suite's file, given by path or by packaged name, as it is written; called by its file's name where it says no
    other. Raises UsageError."""
    path = find_suite(name)
    document = _parsed(_text(path), path, "a suite is a mapping of keys such as source, prompt_template and max_length")
    document.value.setdefault("name", path.stem)
    return document


def _validated(document: Document) -> Recipe:
    try:
        recipe = Recipe.model_validate(document.value)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, document, Recipe))) from None
    # From here on each stage carries what it needs, and nothing is said twice.
    return recipe.model_copy(update={"defaults": Defaults(), "variables": {}})
