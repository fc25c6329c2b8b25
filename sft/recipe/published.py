"""A recipe as it may be shown to anybody: what it does, without passwords, keys and the folders of a machine."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import yaml

from sft.recipe.yaml_marks import RecipeDumper
from sft.utils.secrets import published, scrub, to_look_for, without_home


def secrets_of(recipe: Any, given: str, overrides: Sequence[str]) -> tuple[str, ...]:
    """The secrets that a recipe was filled with: those it holds now, and those of its file and of the command line.

    Variables are gone from a recipe once they stand where they are used; their names tell which are secret.
    """
    return to_look_for(recipe, _tree(given), [_override(*pair) for pair in pairwise([*overrides, ""])])


def published_recipe(text: str, secrets: tuple[str, ...]) -> str:
    """The text of a recipe that may go out; it stays as it is written where nothing in it has to be hidden."""
    text = scrub(without_home(text), *secrets)
    tree = _tree(text)
    clean = published(tree, secrets)
    return text if clean == tree else yaml.dump(clean, Dumper=RecipeDumper, sort_keys=False, allow_unicode=True)


def _tree(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:  # then it was scrubbed as text alone
        return None


def _override(word: str, following: str) -> dict[str, Any]:
    """What a word of the command line sets, as the mapping that it stands for."""
    if not word.startswith("--"):
        return {}
    name, equals, value = word[2:].partition("=")
    text = value if equals else following
    read = _tree(text)
    *outer, last = name.split(".")
    tree: dict[str, Any] = {last: read if isinstance(read, dict | list) else text}
    for part in reversed(outer):
        tree = {part: tree}
    return tree
