"""Defaults, data recipes and variables: filled into the stages before the recipe is checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from sft.recipe.problems import nearest
from sft.recipe.yaml_marks import Document, Path
from sft.utils.errors import UsageError

SECTIONS = ("data", "train", "evaluate")
_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)\}")


def merge_defaults(document: Document) -> None:
    """Copy `defaults` into every stage. A stage's own value wins; mappings are merged, lists replaced."""
    root = document.value
    defaults = root.get("defaults")
    stages = root.get("stages")
    if not isinstance(defaults, dict) or not isinstance(stages, list):
        return
    for index, stage in enumerate(stages):
        if isinstance(stage, dict):
            for section in SECTIONS:
                if defaults.get(section) is not None:
                    fill(document, ("stages", index, section), defaults[section], document, ("defaults", section))


def fill(target: Document, path: Path, value: Any, source: Document, source_path: Path) -> None:
    """Put `value`, which stands at `source_path` of `source`, at `path` of `target` where nothing is set."""
    parent: Any = target.value
    for part in path[:-1]:
        parent = parent[part]
    key = path[-1]
    present = parent.get(key) if isinstance(parent, dict) else parent[key]
    if isinstance(present, dict) and isinstance(value, dict):
        for child, child_value in value.items():
            fill(target, (*path, child), child_value, source, (*source_path, child))
        return
    if (isinstance(parent, dict) and key in parent) and not (present is None and isinstance(value, dict)):
        return
    parent[key] = copy.deepcopy(value)
    for known, origin in list(source.origins.items()):
        if known[: len(source_path)] == source_path:
            target.origins[(*path, *known[len(source_path) :])] = origin


def include_data_recipes(document: Document, find: Callable[[str], Document]) -> None:
    """Fill `data: {recipe: NAME}` of every stage from that data recipe, and its variables into the recipe's.

    The same for each source that names a data recipe, however deep. Raises UsageError for one that includes itself.
    """
    for index, stage in enumerate(document.value.get("stages") or []):
        if isinstance(stage, dict) and isinstance(stage.get("data"), dict):
            _include(document, ("stages", index, "data"), find, ())


def _include(document: Document, path: Path, find: Callable[[str], Document], around: tuple[str, ...]) -> None:
    """Fill the section or source at `path`, then the sources in it; `around` are the recipes that it stands in."""
    section = document.at(path)
    name = section.get("recipe")
    if isinstance(name, str):
        name = substitute_text(name, document, (*path, "recipe"))
        if name in around:
            chain = " -> ".join((*around, name))
            raise UsageError(f"{document.origin((*path, 'recipe'))}: the data recipe includes itself: {chain}")
        _fill_from(document, path, name, find)
        around = (*around, name)
    _spell_out_steps(section)
    sources = section.get("sources")
    for index, source in enumerate(sources if isinstance(sources, list) else []):
        if isinstance(source, dict):
            _include(document, (*path, "sources", index), find, around)


def _spell_out_steps(section: dict[str, Any]) -> None:
    """`- quality` and `- quality:` as `- quality: {}`, so that an override can set a key of it."""
    steps = section.get("steps")
    if not isinstance(steps, list):
        return
    for index, step in enumerate(steps):
        if isinstance(step, str):
            steps[index] = {step: {}}
        elif isinstance(step, dict):
            steps[index] = {name: {} if settings is None else settings for name, settings in step.items()}


def _fill_from(document: Document, path: Path, name: str, find: Callable[[str], Document]) -> None:
    try:
        included = find(name)
    except UsageError as error:
        raise UsageError(f"{document.origin((*path, 'recipe'))}: {error}") from error
    for key, value in included.value.items():
        if key == "variables" and isinstance(value, dict):
            document.value.setdefault("variables", {})
            fill(document, ("variables",), value, included, ("variables",))
        elif key not in ("name", "description"):
            fill(document, (*path, key), value, included, (key,))


def substitute(document: Document) -> None:
    """Replace `${name}` by `variables.name` in every text outside `variables`; `$${` stands for `${`.

    Raises UsageError for a variable that isn't there, and for one set on the command line that nothing uses.
    """
    root = document.value
    _refuse_unused(document, _used({key: value for key, value in root.items() if key != "variables"}))
    for key in root:
        if key != "variables":
            root[key] = _substituted(root[key], document, (key,))


def _used(value: Any) -> set[str]:
    """Names of the variables in a value."""
    if isinstance(value, dict | list):
        children = value.values() if isinstance(value, dict) else value
        return {name for child in children for name in _used(child)}
    return {name for dollar, name in _VARIABLE.findall(value) if not dollar} if isinstance(value, str) else set()


def _refuse_unused(document: Document, used: set[str]) -> None:
    variables = document.value.get("variables")
    for name in variables if isinstance(variables, dict) else ():
        place = document.origin(("variables", name)).place
        if place.startswith("--") and name not in used:
            hint = nearest(name, used) or f"; its variables: {', '.join(sorted(used)) or 'none'}"
            raise UsageError(f"{place}: no ${{{name}}} in this recipe{hint}")


def _substituted(value: Any, document: Document, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _substituted(child, document, (*path, key)) for key, child in value.items()}
    if isinstance(value, list):
        return [_substituted(child, document, (*path, index)) for index, child in enumerate(value)]
    return substitute_text(value, document, path) if isinstance(value, str) else value


def substitute_text(text: str, document: Document, path: Path) -> Any:
    """`text` with its variables filled in; a text that is one variable becomes that variable's value."""
    variables = document.value.get("variables")
    variables = variables if isinstance(variables, dict) else {}

    def value_of(match: re.Match[str]) -> Any:
        if match[1]:
            return match[0][1:]
        if match[2] not in variables:
            hint = nearest(match[2], variables) or "; `$${` stands for a plain `${`"
            raise UsageError(f"{document.origin(path)}: no variable ${{{match[2]}}}{hint}")
        return variables[match[2]]

    whole = _VARIABLE.fullmatch(text)
    return value_of(whole) if whole else _VARIABLE.sub(lambda match: str(value_of(match)), text)
