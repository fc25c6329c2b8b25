"""pydantic's validation errors as lines a recipe's author can act on."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from sft.recipe.problems import in_file_order, nearest
from sft.recipe.yaml_marks import Document, Path

_WANTED = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
}


def explain(error: ValidationError, document: Document, model: type[BaseModel]) -> list[str]:
    """One line per problem, `file:line: key: what is wrong`, in the order of the file."""
    grouped: dict[Path, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        grouped.setdefault(_path_in(document.value, details), []).append(details)
    lines = []
    for path, group in grouped.items():
        origin = document.origin(path)
        # A key that is missing has no line of its own: the line is its section's.
        lines.append(f"{origin}: {_sentence(group, path, model)}")
    return in_file_order(lines)


def _path_in(value: Any, details: ErrorDetails) -> Path:
    """pydantic's location without the parts that name a union's branch or a mapping's key."""
    path: list[str | int] = []
    for part in details["loc"]:
        inside = part in value if isinstance(value, dict) else isinstance(part, int) and part < _length(value)
        if inside:
            value = value[part]
        elif details["type"] == "missing" or (details["type"] == "recipe" and part == details["loc"][-1]):
            # A key that isn't written is what is told; other parts that aren't there name a union's branch.
            value = None
        else:
            break
        path.append(part)
    return tuple(path)


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


def _sentence(group: list[ErrorDetails], path: Path, model: type[BaseModel]) -> str:
    details = group[0]
    kind = details["type"]
    if kind == "recipe":
        return str(details["msg"])
    if kind == "extra_forbidden":
        return f"unknown key{_hint(path, model)}"
    if kind == "missing":
        return "is missing"
    got = _show(details["input"])
    if kind == "literal_error":
        expected = details["ctx"]["expected"]
        known = expected.replace("'", "").replace(" or ", ", ").split(", ")
        if details["loc"][-1] == "[key]":
            return f"unknown key{nearest(str(path[-1]), known) or '; it may be ' + expected}"
        return f"must be {expected}, got {got}{nearest(str(details['input']), known)}"
    if kind in _WANTED:
        wanted = dict.fromkeys(_WANTED[entry["type"]] for entry in group if entry["type"] in _WANTED)
        quote = list(wanted) == ["text"] and isinstance(details["input"], int | float)
        return f"must be {' or '.join(wanted)}, got {got}{'; put it in quotes' if quote else ''}"
    if kind == "string_pattern_mismatch":
        return f"may have letters, digits, '.', '_' and '-' only, got {got}"
    message = details["msg"][:1].lower() + details["msg"][1:]
    return f"{message.replace('input should be', 'must be').replace('input should', 'must')}, got {got}"


def _show(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "nothing"}[value]
    if isinstance(value, (dict, list)):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _hint(path: Path, model: type[BaseModel]) -> str:
    """The section inside that has the key, or the nearest right key, or all there are when none is near."""
    section = _section_at(path[:-1], model)
    known = list(section.model_fields) if section else []
    if len(path) == 1 and section and {"stages", "defaults"} <= set(known) and path[0] in ("data", "train", "evaluate"):
        return f" here: it is set of a stage, stages.NAME.{path[0]}, or of all, defaults.{path[0]}"
    for name in known:
        inside = _section_at((*path[:-1], name), model)
        if inside is not None and path[-1] in inside.model_fields:
            return f", did you mean {name}.{path[-1]}?"
    return nearest(str(path[-1]), known) or (f"; keys here: {', '.join(known)}" if known else "")


def _section_at(path: Path, model: type[BaseModel]) -> type[BaseModel] | None:
    """The section's model at `path`, walking through lists and optional sections."""
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        field = current.model_fields.get(part) if current else None
        current = _model_in(field.annotation) if field else None
    return current


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    found = (_model_in(argument) for argument in typing.get_args(annotation))
    return next((model for model in found if model is not None), None)
