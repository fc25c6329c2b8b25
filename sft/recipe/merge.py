"""Defaults, data recipes, suites and variables: filled into the stages before the recipe is checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator
from pathlib import PurePosixPath
from typing import Any

from sft.recipe.problems import nearest
from sft.recipe.yaml_marks import MOST_VALUES, Document, Origin, Path
from sft.utils.errors import UsageError

SECTIONS = ("data", "train", "evaluate")
_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)\}")
_NAME = re.compile(r"[^A-Za-z0-9._/:-]+")


def merge_defaults(document: Document) -> None:
    """Copy `defaults` into every stage. A stage's own value wins; mappings are merged, lists replaced."""
    defaults = document.value.get("defaults")
    for index, _ in _stages(document) if isinstance(defaults, dict) else ():
        for section in SECTIONS:
            if defaults.get(section) is not None:
                fill(document, ("stages", index, section), defaults[section], document, ("defaults", section))


def _stages(document: Document) -> list[tuple[int, dict[str, Any]]]:
    """The stages, as far as they are mappings, and where they stand."""
    stages = document.value.get("stages")
    return [(i, stage) for i, stage in enumerate(stages if isinstance(stages, list) else []) if isinstance(stage, dict)]


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
    parent[key] = _copied(target, path, value, source, source_path)


def _copied(target: Document, path: Path, value: Any, source: Document, source_path: Path) -> Any:
    """A copy of `value`, its origins noted."""
    if source_path in source.origins:
        target.origins[path] = source.origins[source_path]
    if len(target.origins) > MOST_VALUES:
        raise UsageError(
            f"{source.origin(source_path)}: with this filled into the stages, the recipe has more than "
            f"{MOST_VALUES:,} values"
        )
    if not isinstance(value, dict | list):
        return value
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    copies = {key: _copied(target, (*path, key), child, source, (*source_path, key)) for key, child in pairs}
    return copies if isinstance(value, dict) else list(copies.values())


def include_data_recipes(document: Document, find: Callable[[str], Document]) -> None:
    """Fill `data: {recipe: NAME}` of every stage from that data recipe, and its variables into the recipe's.

    The same for each source that names a data recipe, however deep. Raises UsageError for one that includes itself, and
    for a section that has sources beside it.
    """
    for index, stage in _stages(document):
        if isinstance(stage.get("data"), dict):
            _refuse_two(document, ("stages", index, "data"))
            _include(document, ("stages", index, "data"), find, ())


def _include(document: Document, path: Path, find: Callable[[str], Document], around: tuple[str, ...]) -> None:
    """Fill the section or source at `path`, then the sources in it; `around` are the recipes that it stands in."""
    section = document.at(path)
    name = section.get("recipe")
    name = substitute_text(name, document, (*path, "recipe")) if isinstance(name, str) else None
    if isinstance(name, str):
        where = document.origin((*path, "recipe"))
        if name in around:
            raise UsageError(f"{where}: the data recipe includes itself: {' -> '.join((*around, name))}")
        included = _found(document, (*path, "recipe"), name, find)
        _fill_from(document, path, included, ("name", "description"))
        if not section.get("sources"):
            raise UsageError(f"{where}: the data recipe {name} has no `sources`")
        around = (*around, name)
    _spell_out_steps(section)
    for inside, _ in _inner(section):
        _include(document, (*path, *inside), find, around)


def _refuse_two(document: Document, path: Path) -> None:
    """Raise UsageError where a file says a section's sources and its data recipe, which brings its own: its steps speak
    of those. (An override may put others in their place.)"""
    section = document.at(path)
    places = [document.origin((*path, key)) for key in ("sources", "recipe")]
    if section.get("sources") and isinstance(section.get("recipe"), str) and _same_file(places):
        raise UsageError(
            f"{places[1]}: the data recipe {section['recipe']} brings its own sources, and {places[0]} says others for "
            "the same stage: take one out, or name the recipe as one of the sources, {recipe: NAME}"
        )


def _same_file(places: list[Origin]) -> bool:
    first, second = (place.place.rpartition(":")[0] for place in places)
    return first == second and bool(first)


def forget_names(document: Document) -> None:
    """Take out the names of data recipes and suites, whose content stands in the stages now; a source goes on being
    called so."""
    for _, stage in _stages(document):
        if isinstance(stage.get("data"), dict):
            _forget(stage["data"])
        if isinstance(stage.get("evaluate"), dict):
            forget_suites(stage["evaluate"].get("suites"))


def _forget(section: dict[str, Any]) -> None:
    if isinstance(section.get("recipe"), str):
        del section["recipe"]
    for _, source in _inner(section):
        if isinstance(source.get("recipe"), str) and source.get("name") is None:
            source["name"] = _NAME.sub("-", name_of(source["recipe"]))
        _forget(source)


def _inner(section: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The sources in a section or source, as far as they are mappings, and those it validates on; by their place."""
    held = section.get("validation")
    for before, holder in ((), section), (("validation",), held if isinstance(held, dict) else {}):
        sources = holder.get("sources")
        for index, source in enumerate(sources if isinstance(sources, list) else []):
            if isinstance(source, dict):
                yield (*before, "sources", index), source


def name_of(place: str) -> str:
    """What a source is called by default: the last part of its Hub id, or its file's name without the ending; its
    folder's, where all files of that are meant."""
    *folders, last = place.rstrip("/").split("/")
    if PurePosixPath(last).stem == "*" and folders:  # all files of a folder
        return folders[-1]
    return PurePosixPath(last).stem if last.endswith((".yaml", ".jsonl", ".parquet")) else last


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


def _found(document: Document, path: Path, name: str, find: Callable[[str], Document]) -> Document:
    """The file that the text at `path` names."""
    try:
        return find(name)
    except UsageError as error:
        raise UsageError(f"{document.origin(path)}: {error}") from error


def _fill_from(document: Document, path: Path, included: Document, left_out: Collection[str]) -> None:
    for key, value in included.value.items():
        if key == "variables" and isinstance(value, dict):
            document.value.setdefault("variables", {})
            fill(document, ("variables",), value, included, ("variables",))
        elif key not in left_out:
            fill(document, (*path, key), value, included, (key,))


def include_suites(document: Document, find: Callable[[str], Document]) -> None:
    """Fill what every stage's `evaluate: {suites: [NAME, {suite: NAME, ...}]}` names from these suites' files."""
    for index, stage in _stages(document):
        if isinstance(stage.get("evaluate"), dict):
            fill_suites(document, ("stages", index, "evaluate", "suites"), find)


def fill_suites(document: Document, path: Path, find: Callable[[str], Document]) -> None:
    """The same for the list of suites at `path`. A suite's own `source` takes the place of the file's.

    Raises UsageError for a suite that isn't there, and for one that is made from itself.
    """
    suites = document.at(path[:-1]).get(path[-1])
    for index, entry in enumerate(suites if isinstance(suites, list) else []):
        if isinstance(entry, str):
            suites[index] = {"suite": entry}
        if isinstance(suites[index], dict):
            _fill_suite(document, (*path, index), find)


def _fill_suite(document: Document, path: Path, find: Callable[[str], Document]) -> None:
    suite, where, around = document.at(path), (*path, "suite"), list[str]()
    name = suite.get("suite")
    while isinstance(name, str) and isinstance(name := substitute_text(name, document, where), str):
        if name in around:
            raise UsageError(f"{document.origin(where)}: the suite is made from itself: {' -> '.join((*around, name))}")
        included = _found(document, where, name, find)
        source = suite.get("source")
        own = isinstance(source, dict) and not {"path", "generate"}.isdisjoint(source)
        _fill_from(document, path, included, ("suite", "description", *(["source"] if own else [])))
        around.append(name)
        name = included.value.get("suite")


def forget_suites(suites: Any) -> None:
    """Take out the names of suites, whose keys stand in the list now."""
    for suite in suites if isinstance(suites, list) else []:
        if isinstance(suite, dict) and isinstance(suite.get("suite"), str):
            del suite["suite"]


def escaped(text: str) -> str:
    """The text that substitution turns into `text`."""
    return _VARIABLE.sub(lambda match: f"${match[0]}", text)


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
