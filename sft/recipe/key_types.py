"""What the schema says of a key, found by the way a recipe or an override writes it."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel

from sft.recipe.schema import Defaults, Recipe, Stage

LEAVES = (str, int, float, bool, type(None))


def kinds_at(parts: tuple[str, ...]) -> set[Any]:
    """The types that the value at a key may have; empty for a key that isn't there.

    `parts`: of an override, with a name, a number or `all` where a list's item is meant. Types are str (any text), int,
    float, bool, NoneType, list, dict, Any, or a section.
    """
    current = list(branches(Recipe))
    for part in parts:
        current = [kind for one in current for child in _children(one, part) for kind in branches(child)]
    return {typing.get_origin(one) or one for one in current}


def takes_text(parts: tuple[str, ...]) -> bool:
    """Whether the key's value is a text, and never a number or a switch."""
    kinds = kinds_at(parts)
    return str in kinds and not kinds & {int, float, bool, Any}


def takes_nothing(parts: tuple[str, ...]) -> bool:
    """Whether null is a value of the key."""
    return type(None) in kinds_at(parts)


def branches(annotation: Any) -> Iterator[Any]:
    """The types that an annotation stands for: a union's, a literal's; lists and mappings as they are."""
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        yield from branches(typing.get_args(annotation)[0])
    elif origin in (typing.Union, types.UnionType):
        for one in typing.get_args(annotation):
            yield from branches(one)
    elif origin is Literal:
        yield from {type(value) for value in typing.get_args(annotation)}
    else:
        yield annotation


def _children(kind: Any, part: str) -> Iterator[Any]:
    arguments = typing.get_args(kind)
    if kind is Any or kind is Defaults:
        # Defaults are written as a stage's sections are.
        field = Stage.model_fields.get(part) if kind is Defaults else None
        yield field.annotation if field else Any
    elif isinstance(kind, type) and not arguments and issubclass(kind, BaseModel):
        if part in kind.model_fields:
            yield kind.model_fields[part].annotation
    elif arguments:
        yield arguments[-1]
