"""Values set on the command line: `--stages.sft.train.learning_rate 2e-5`. The later of two wins."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sft.recipe.key_types import kinds_at, takes_nothing, takes_text
from sft.recipe.yaml_marks import Document, Origin, Path, parse_value, readable
from sft.utils.errors import UsageError

# What a line of the recipe is called when it came from the command line.
MANY = 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Override:
    """One `--key value`."""

    key: str
    value: Any

    @property
    def parts(self) -> tuple[str, ...]:
        """The key at its dots."""
        return tuple(self.key.split("."))

    @property
    def needs_stages(self) -> bool:
        """Whether it reaches into a stage, and so is applied once defaults and data recipes are merged into it."""
        return self.parts[0] == "stages" and len(self.parts) > 2 and self.parts[2:] != ("data", "recipe")


def parse_overrides(arguments: Sequence[str]) -> list[Override]:
    """`["--a.b", "1", "--c=x"]` as overrides. Raises UsageError for a value without key or a key without value."""
    return [Override(key, override_value(key, text)) for key, text in split_overrides(arguments)]


def split_overrides(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The keys of overrides, and the text that each is given. Raises UsageError as `parse_overrides` does."""
    pairs: list[tuple[str, str]] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or word == "--":
            raise UsageError(f"{word!r}: expected --key value; a key of the recipe starts with two dashes")
        key, equals, text = word[2:].partition("=")
        if not all(key.split(".")):
            raise UsageError(f"{word}: an override is written --section.key value")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise UsageError(f"--{key}: needs a value, e.g. --{key} true")
            text = rest.pop(0)
        readable(key, f"--{key!a}")
        pairs.append((key, text))
    return pairs


def override_value(key: str, text: str, *, inside: str = "") -> Any:
    """What a word of the command line is for its key, one of the recipe's or of the section `inside` it. A text is
    taken as the shell gives it."""
    parts, place = tuple(f"{inside}.{key}".lstrip(".").split(".")), f"--{key}"
    listed = text.lstrip().startswith(("{", "["))
    if takes_text(parts) and not (listed and kinds_at(parts) & {list, dict}):
        return None if text == "null" and takes_nothing(parts) else readable(text, place)
    return parse_value(text, place)


def apply_override(document: Document, override: Override) -> None:
    """Set the value in `document`; mappings on the way are made, list items must be there."""
    for path in _paths(document.value, override, ()):
        _set(document, path, override)


def _paths(value: Any, override: Override, done: Path) -> list[Path]:
    """The paths that the key means: `all` in place of a stage's name means every stage."""
    parts = override.parts[len(done) :]
    if not parts:
        return [done]
    if isinstance(value, list):
        paths: list[Path] = []
        for index in _indices(value, parts[0], override, done):
            paths += _paths(value[index], override, (*done, index))
        return paths
    child = value.get(parts[0]) if isinstance(value, dict) else None
    return _paths(child, override, (*done, parts[0]))


def _indices(items: list[Any], part: str, override: Override, done: Path) -> list[int]:
    if re.fullmatch("[0-9]{1,6}", part) and int(part) < len(items):
        return [int(part)]
    if part == "all":
        return list(range(len(items)))
    names = [item.get("name") if isinstance(item, dict) else None for item in items]
    if part in names:
        return [names.index(part)]
    known = [str(name) for name in names if name is not None] or [str(index) for index in range(len(items))]
    listed = ", ".join(known[:MANY])
    raise UsageError(f"--{override.key}: {'.'.join(map(str, done))} has no {part!r}; there are: {listed}")


def _set(document: Document, path: Path, override: Override) -> None:
    target: Any = document.value
    for depth, part in enumerate(path[:-1]):
        child: Any = target.get(part) if isinstance(target, dict) else target[part]
        if child is None:
            child = target[part] = {}
            document.origins[path[: depth + 1]] = Origin(f"--{override.key}", ())
        if not isinstance(child, (dict, list)):
            where = ".".join(map(str, path[: depth + 1]))
            raise UsageError(f"--{override.key}: {where} is {child!r}, which has no keys")
        target = child
    if isinstance(target, dict):
        _refuse_late(path[-1], target, override)
    target[path[-1]] = override.value
    for known in [known for known in document.origins if known[: len(path)] == path]:
        del document.origins[known]
    _note(document, path, override.value, Origin(f"--{override.key}", ()))


def _refuse_late(key: str | int, target: dict[str, Any], override: Override) -> None:
    """Raise UsageError for the name of a file whose keys have been filled in before."""
    recipe = key == "recipe" and override.needs_stages and "sources" in target
    if recipe or (key == "suite" and "source" in target):
        what = "the sources here are" if recipe else "the suite here is"
        raise UsageError(f"--{override.key}: has no effect, {what} filled in already; change the file")


def _note(document: Document, path: Path, value: Any, origin: Origin) -> None:
    """Say that the value at `path`, and all in it, comes from the command line."""
    document.origins[path] = origin
    for key, child in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        _note(document, (*path, key), child, replace(origin, path=(*origin.path, key)))


def tell_defaults(document: Document, overrides: Sequence[Override]) -> None:
    """Say where a value set under `defaults` doesn't reach, once all is filled in: a stage's own wins.

    Raises UsageError for one that reaches no stage.
    """
    stages = document.value.get("stages")
    count = len(stages) if isinstance(stages, list) else 0
    last = {override.key: override for override in overrides if override.parts[0] == "defaults"}
    for key, override in last.items():
        origins = document.origins.items()
        reached = {path[1] for path, origin in origins if path[:1] == ("stages",) and origin.place == f"--{key}"}
        own = [str(document.origin(("stages", i, *override.parts[1:]))) for i in range(count) if i not in reached]
        if own and not reached:
            inside = ".".join(override.parts[1:])
            raise UsageError(
                f"--{key}: has no effect, since every stage has a value of its own ({'; '.join(own[:MANY])}): use "
                f"--stages.all.{inside}"
            )
        if own:
            log.warning("--%s: has no effect on %s, which wins", key, "; ".join(own[:MANY]))
