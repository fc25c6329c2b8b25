"""Kinds of values that several sections of a recipe have: names that become folders, paths, seeds."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

HUB_ID = r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?"
"""What a repository on the Hub may be called."""
LONGEST_NAME = 100
LONGEST_PATH = 4000
LARGEST_SEED = 2**32 - 1

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
"""Of a random generator: what numpy's takes."""


def path_problem(text: str) -> str | None:
    """Why no file can have this path, or no terminal can show it; None for one that can."""
    if not text.strip():
        return "is empty"
    if not text.isprintable():
        return "has a character that can't be shown, such as a line break"
    if len(text.encode()) > LONGEST_PATH or any(len(part.encode()) > 255 for part in text.split("/")):
        return "is too long for a file system: 255 bytes between two slashes, 4,000 in all"
    return None


def _checked_path(text: str) -> str:
    if problem := path_problem(text):
        raise PydanticCustomError("recipe", "{reason}", {"reason": problem})
    return text


def _checked_name(text: str) -> str:
    if any(not part or part.startswith(".") for part in text.split("/")):
        raise PydanticCustomError("recipe", "can't begin with a dot or a slash, got {got}", {"got": repr(text)})
    return text


PathText = Annotated[str, AfterValidator(_checked_path)]
"""A path or Hub id."""

Name = Annotated[str, Field(pattern="^[A-Za-z0-9._-]+$", max_length=LONGEST_NAME), AfterValidator(_checked_name)]
"""What becomes a folder's name."""

SourceName = Annotated[str, Field(pattern="^[A-Za-z0-9._/:-]+$", max_length=200), AfterValidator(_checked_name)]
"""What a source is called; a Hub id may be."""
