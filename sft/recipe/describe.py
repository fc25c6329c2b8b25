"""The schema for people and editors: a section's keys with what they mean, and the whole as JSON Schema."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sft.recipe.key_types import branches
from sft.recipe.problems import nearest
from sft.recipe.schema import EVERY, Defaults, Recipe, Stage
from sft.utils.errors import UsageError

VARIABLE = {"type": "string", "pattern": r"\$\{[A-Za-z_][A-Za-z0-9_]*\}"}
"""What may stand for any value."""


class Key(NamedTuple):
    """A key of a section: what it may be, its default, and what it means."""

    name: str
    kind: str
    default: str
    meaning: str


def sections() -> dict[str, type[BaseModel]]:
    """Every section by its keys from the top, `stages.data.steps.mix`; the recipe itself is the empty text."""
    return dict(_sections(Recipe, "", ()))


def find_section(name: str) -> tuple[str, type[BaseModel]]:
    """The section whose keys end so: `train`, `mix` or `stages.train`. Raises UsageError with the nearest."""
    known = sections()
    found = [path for path in known if path == name or path.endswith(f".{name}")]
    if not found:
        hint = nearest(name, {path.split(".")[-1] for path in known if path}) or "; `sft recipes keys` lists them"
        raise UsageError(f"no section {name!r}{hint}")
    path = min(found, key=lambda one: (one.count("."), len(one)))
    return path, known[path]


def keys_of(section: type[BaseModel]) -> list[Key]:
    """The keys that a section takes."""
    fields = Stage.model_fields if section is Defaults else section.model_fields
    return [
        Key(name, _kind(field), _default(field), _meaning(field))
        for name, field in fields.items()
        if section is not Defaults or name in Defaults.model_fields
    ]


def sections_within(field: FieldInfo) -> list[type[BaseModel]]:
    """The sections that a key's value may be, or may hold."""
    return list(dict.fromkeys(_within(field.annotation)))


def json_schema() -> dict[str, Any]:
    """A recipe's JSON Schema, of the file as it is written: before defaults, data recipes and variables are filled in.

    So nothing that these may give is required, and any value may be a variable.
    """
    schema = Recipe.model_json_schema()
    for section in (schema, *schema["$defs"].values()):
        if "properties" not in section:
            continue
        section.pop("required", None)
        for name, inside in section["properties"].items():
            section["properties"][name] = _written(inside)
    stage, defaults = schema["$defs"]["Stage"]["properties"], schema["$defs"]["Defaults"]["properties"]
    for name in defaults:
        defaults[name] = stage[name]
    entry, suite = schema["$defs"]["StepEntry"], schema["$defs"]["SuiteSection"]
    schema["$defs"]["StepEntry"] = {"anyOf": [{"enum": list(entry["properties"])}, entry]}
    schema["$defs"]["SuiteSection"] = {"anyOf": [{"type": "string"}, suite]}
    word = {"type": "string", "pattern": f"^{EVERY}$"}
    schema["$defs"]["EverySection"] = {"anyOf": [word, schema["$defs"]["EverySection"]]}
    schema["required"] = ["name", "output_dir", "model", "stages"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "sambay-sft recipe", **schema}


def _written(inside: dict[str, Any]) -> dict[str, Any]:
    """A key's schema with what a file may say instead: a variable, or nothing for an empty section."""
    told: dict[str, Any] = {key: inside.pop(key) for key in ("description", "default", "title") if key in inside}
    items = inside.get("items")
    if isinstance(items, dict):
        inside["items"] = {"anyOf": [items, VARIABLE]}
    return {**told, "anyOf": [inside, VARIABLE, {"type": "null"}]}


def _sections(section: type[BaseModel], path: str, around: tuple[type, ...]) -> Iterator[tuple[str, type[BaseModel]]]:
    yield path, section
    for name, field in section.model_fields.items() if section is not Defaults else ():
        for kind in _within(field.annotation):
            if kind not in (*around, section):
                yield from _sections(kind, f"{path}.{name}".lstrip("."), (*around, section))


def _within(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a value of this type may hold."""
    for kind in branches(annotation):
        arguments = typing.get_args(kind)
        if arguments:
            yield from _within(arguments[-1])
        elif isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _kind(field: FieldInfo) -> str:
    return " or ".join(dict.fromkeys(_word(one) for one in _alternatives(field.annotation)))


def _alternatives(annotation: Any) -> Iterator[Any]:
    """Like `branches`, with literals as they are, and without null, which the default tells."""
    if typing.get_origin(annotation) is Literal:
        yield annotation
        return
    inside = [one for one in typing.get_args(annotation) if typing.get_origin(annotation) not in (list, dict)]
    if inside and typing.get_origin(annotation) is not None:
        nested = inside[:1] if typing.get_origin(annotation) is typing.Annotated else inside
        for one in nested:
            yield from _alternatives(one)
    elif annotation is not type(None):
        yield annotation


def _word(kind: Any) -> str:
    names = {str: "text", int: "whole number", float: "number", bool: "true/false", Any: "anything"}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return " | ".join(str(value) for value in arguments)
    if origin is list:
        return f"list of {' or '.join(dict.fromkeys(_word(one) for one in _alternatives(arguments[0])))}"
    if origin is dict:
        return f"mapping to {' or '.join(dict.fromkeys(_word(one) for one in _alternatives(arguments[1])))}"
    return names.get(kind, "section")


def _meaning(field: FieldInfo) -> str:
    """The key's description, or that of the one kind of section that it holds."""
    inside = sections_within(field)
    text = field.description or (inside[0].__doc__ if len(inside) == 1 else "") or ""
    return " ".join(text.split())


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None or isinstance(value, BaseModel):
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
