"""A grid of recipes: keys with several values each, `--stages.sft.train.learning_rate 1e-5,2e-5`, in every combination.

Each point of it is a run of its own, in a folder that is called by what it differs in from the others.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.recipe.data_checks import recipe_problems
from sft.recipe.key_types import kinds_at
from sft.recipe.load import load_recipe
from sft.recipe.merge import escaped
from sft.recipe.overrides import override_value, split_overrides
from sft.recipe.problems import in_file_order, refuse
from sft.recipe.schema import Recipe
from sft.utils.errors import UsageError

MOST_POINTS = 1000
LONGEST_NAME = 200
"""Bytes of a point's folder: file systems end at 255, and what is written beside it has a longer name."""
SEEDS = ("seed", "data_seed")
PLACES = ("output_dir", "prepared_dir")


@dataclass(frozen=True)
class Axis:
    """A key with several values. `label`: as much of the key's end as tells it from the other axes."""

    key: str
    label: str
    words: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def is_seed(self) -> bool:
        """Whether points that differ in it alone are the same setting, drawn again."""
        return self.key.rpartition(".")[2] in SEEDS


@dataclass(frozen=True)
class Point:
    """One run. `values`: of each axis, by its label."""

    name: str
    values: dict[str, Any]
    recipe: Recipe = field(repr=False)


@dataclass(frozen=True)
class Grid:
    """All combinations of the axes' values, the last axis turning fastest."""

    root: Path
    axes: tuple[Axis, ...]
    points: tuple[Point, ...]


def load_grid(config: str, words: Sequence[str]) -> Grid:
    """The grid that `config` (a file or a packaged recipe) and the overrides `words` mean.

    A value holds several where a comma stands in it outside brackets; `\\,` is a comma inside one. Raises UsageError
    with a line for each thing that is wrong at any point.
    """
    pairs = split_overrides(words)
    last = {key: place for place, (key, _) in enumerate(pairs)}
    # The later of two wins, as everywhere.
    given = [(key, split_values(key, text)) for place, (key, text) in enumerate(pairs) if last[key] == place]
    axes = _axes([(key, texts) for key, texts in given if len(texts) > 1])
    count = math.prod(len(axis.values) for axis in axes)
    if count > MOST_POINTS:
        raise UsageError(f"{count:,} points are too many for one sweep: {MOST_POINTS:,} at most")
    chosen = itertools.product(*(range(len(axis.values)) for axis in axes))
    plans = [_plan(given, axes, places) for places in chosen]
    with _told_once():
        recipes = _loaded(config, [plan for plan, _ in plans])
        roots = {recipe.output_dir for recipe in recipes}
        if len(roots) > 1:
            raise UsageError(f"output_dir follows from what is swept ({', '.join(sorted(roots))}): name one folder")
        root = Path(recipes[0].output_dir)
        prepared = recipes[0].prepared_dir or str(root / "prepared")
        names = [_name(values) for _, values in plans]
        moved = [
            [*plan, "--output_dir", escaped(str(root / name))] for (plan, _), name in zip(plans, names, strict=True)
        ]
        recipes = _loaded(config, [[*plan, "--prepared_dir", escaped(prepared)] for plan in moved])
    made = zip(names, (values for _, values in plans), recipes, strict=True)
    points = tuple(Point(name, values, recipe) for name, values, recipe in made)
    _refuse_equal(points)
    return Grid(root, axes, points)


def split_values(key: str, text: str) -> list[str]:
    """The values that a word of the command line gives a key; one where no comma parts it.

    Brackets hold commas of their own, but where the key takes nothing but text. Raises UsageError for an empty value.
    """
    kinds = kinds_at(tuple(key.split(".")))
    bracketed = not kinds or bool(kinds - {str, type(None)})
    values, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        if bracketed and letter in "[{":
            depth += 1
        elif bracketed and letter in "]}":
            depth = max(0, depth - 1)
        elif letter == "," and not depth and text[max(0, place - 1) : place] != "\\":
            values.append(text[start:place])
            start = place + 1
    values = [value.replace("\\,", ",") for value in [*values, text[start:]]]
    if len(values) > 1 and not all(value.strip() for value in values):
        raise UsageError(f"--{key}: a value is empty in {text!r}; a comma that belongs to a value is written \\,")
    return values


def shown(value: Any) -> str:
    """A value as it stands in names and tables: the same however it was written, `1e-05` for 0.00001."""
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- axes ----


def _axes(swept: list[tuple[str, list[str]]]) -> tuple[Axis, ...]:
    if not swept:
        raise UsageError("nothing is swept: give a key several values, as in --defaults.train.seed 1,2")
    axes = []
    for key, texts in swept:
        if key in PLACES:
            raise UsageError(f"--{key}: can't be swept: the runs lie in one folder, and share what is prepared")
        values = [override_value(key, text) for text in texts]
        names = [shown(value) for value in values]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"--{key}: has the value {twice} twice")
        axes.append(Axis(key, _label(key, [other for other, _ in swept]), tuple(texts), tuple(values)))
    return tuple(axes)


def _label(key: str, keys: list[str]) -> str:
    parts = key.split(".")
    for count in range(1, len(parts)):
        end = parts[-count:]
        if sum(other.split(".")[-count:] == end for other in keys) == 1:
            return ".".join(end)
    return key


# ---- points ----


def _plan(
    given: list[tuple[str, list[str]]], axes: Sequence[Axis], places: Sequence[int]
) -> tuple[list[str], dict[str, Any]]:
    """A point's overrides, in the order of the command line, and its values by label."""
    chosen = {axis.key: axis.words[place] for axis, place in zip(axes, places, strict=True)}
    words = [f"--{key}={chosen.get(key, texts[0])}" for key, texts in given]
    return words, {axis.label: axis.values[place] for axis, place in zip(axes, places, strict=True)}


def _loaded(config: str, plans: Sequence[list[str]]) -> list[Recipe]:
    """The recipes of all plans; what is wrong with any of them is told once."""
    recipes, lines = [], []
    for plan in plans:
        try:
            recipe = load_recipe(config, plan)
            refuse(recipe_problems(recipe), recipe.place)
            recipes.append(recipe)
        except UsageError as error:
            lines += str(error).splitlines()
    if lines:
        raise UsageError("\n".join(in_file_order(lines)))
    return recipes


def _refuse_equal(points: Sequence[Point]) -> None:
    """Two runs of one recipe would tell nothing, and something on the command line has no effect."""
    seen: dict[str, str] = {}
    for point in points:
        content = point.recipe.model_dump_json(exclude={"output_dir"})
        if content in seen:
            raise UsageError(f"{seen[content]} and {point.name} are the same recipe: what differs has no effect in it")
        seen[content] = point.name


def _name(values: dict[str, Any]) -> str:
    name = ",".join(f"{_in_a_name(label)}={_in_a_name(shown(value))}" for label, value in values.items())
    return name if len(name.encode()) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 9]}-{_digest(name)}"


def _in_a_name(text: str) -> str:
    """A text without what a folder's name can't hold well; two texts never give the same."""
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:40]
    return plain if plain == text else f"{plain}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@contextmanager
def _told_once() -> Iterator[None]:
    """What a recipe's reader warns of is the same at every point: each sentence comes once."""
    seen: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        before = len(seen)
        seen.add(record.getMessage())
        return len(seen) > before

    log = logging.getLogger("sft.recipe.overrides")
    log.addFilter(is_new)
    try:
        yield
    finally:
        log.removeFilter(is_new)
