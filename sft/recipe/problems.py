"""Problems found in a recipe: where, and what to do. Shared by the schema and the loader."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NoReturn

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from sft.recipe.yaml_marks import Path, show_path
from sft.utils.errors import UsageError


class Section(BaseModel):
    """A strict mapping: an unknown key is an error, `"3"` is no number, and an empty section is an empty mapping."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _empty_section(cls, value: Any) -> Any:
        return {} if value is None else value

    def written(self) -> dict[str, Any]:
        """Key -> value of what a file must say so that loading it gives this section."""
        fields = type(self).model_fields
        return {key: value for key, value in self if not (value is None and fields[key].default is None)}

    def changed(self, key: str) -> bool:
        """Whether a key has another value than its default."""
        return bool(getattr(self, key) != type(self).model_fields[key].get_default(call_default_factory=True))


class KeyProblem(NamedTuple):
    """What is wrong with the value at `loc`, counted from the section that found it."""

    loc: tuple[str | int, ...]
    message: str
    value: Any


def raise_problems(title: str, problems: Iterable[KeyProblem], others: ValidationError | None = None) -> NoReturn:
    """Raise a pydantic ValidationError that points at the keys themselves, not at their section.

    `others` are problems that pydantic found itself; they are told too.
    """
    details: list[InitErrorDetails] = [
        {
            "type": PydanticCustomError("recipe", "{reason}", {"reason": problem.message}),
            "loc": problem.loc,
            "input": problem.value,
        }
        for problem in problems
    ]
    for found in others.errors() if others else []:
        # A section inside this one may have told its problems so already.
        own = found["type"] == "recipe"
        kind = PydanticCustomError("recipe", "{reason}", found.get("ctx")) if own else found["type"]
        details.append({"type": kind, "loc": found["loc"], "input": found["input"], "ctx": found.get("ctx", {})})
    raise ValidationError.from_exception_data(title, details)


def refuse(problems: Iterable[KeyProblem], place: Callable[[Path], object] = show_path) -> None:
    """Raise UsageError with a line for each problem, in the order of the file; nothing where there are none.

    `place`: what the line says of a problem's place, such as `my.yaml:12: stages[0].train.optim`.
    """
    lines = [f"{place(found.loc)}: {found.message}" for found in problems]
    if lines:
        raise UsageError("\n".join(in_file_order(lines)))


def in_file_order(lines: Iterable[str]) -> list[str]:
    """Lines that begin with `file:line:`, each once, by their number; those of the command line last."""
    return sorted(dict.fromkeys(lines), key=_line_number)


def _line_number(line: str) -> tuple[bool, int]:
    parts = line.split(":", 2)
    number = parts[1] if len(parts) > 1 else ""
    return (line.startswith("--"), int(number) if number.isdigit() else 0)


def nearest(key: str, known: Iterable[str]) -> str:
    """`, did you mean X?` when a known key is near, else nothing."""
    matches = difflib.get_close_matches(key.lower(), sorted(known), n=1, cutoff=0.6)
    return f", did you mean {matches[0]}?" if matches else ""
