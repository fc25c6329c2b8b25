"""The recipes and suites that come with the tool: `configs/` and `data_recipes/` of the checkout or of the wheel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sft.recipe.problems import nearest
from sft.utils.errors import UsageError, shown


@dataclass(frozen=True)
class Packaged:
    """A packaged recipe: the name that --config takes, its file, and the first line of its comment."""

    name: str
    path: Path
    title: str


def folder(name: str) -> Path:
    """`configs` or `data_recipes`: inside the package when installed from a wheel, else at the checkout's top."""
    package = Path(__file__).resolve().parents[1]
    installed = package / name
    return installed if installed.is_dir() else package.parent / name


def list_recipes() -> list[Packaged]:
    """Every packaged recipe. `configs/a/recipe.yaml` is called `a`, `configs/a/b.yaml` is called `a/b`."""
    found = {}
    for path in sorted(folder("configs").glob("*/*.yaml")):
        if path.parent.name not in ("accelerate", "deepspeed", "suites"):
            name = path.parent.name if path.name == "recipe.yaml" else f"{path.parent.name}/{path.stem}"
            found[name] = Packaged(name, path, _title(path))
    return [found[name] for name in sorted(found)]


def list_data_recipes() -> list[Packaged]:
    """Every packaged data recipe, called by its file's name."""
    return [Packaged(path.stem, path, _title(path)) for path in sorted(folder("data_recipes").glob("*.yaml"))]


def list_suites() -> list[Packaged]:
    """Every packaged suite, called by its file's name."""
    return [Packaged(path.stem, path, _title(path)) for path in sorted(folder("configs").glob("suites/*.yaml"))]


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by packaged name. Raises UsageError."""
    return _find(name, list_recipes(), "recipe")


def find_data_recipe(name: str) -> Path:
    """The file of a data recipe given by path or by packaged name. Raises UsageError."""
    return _find(name, list_data_recipes(), "data recipe")


def find_suite(name: str) -> Path:
    """The file of a suite given by path or by packaged name. Raises UsageError."""
    return _find(name, list_suites(), "suite")


def find_deepspeed(name: str) -> Path | None:
    """The packaged DeepSpeed configuration called `name` (zero1, zero2, zero3), or None."""
    path = folder("configs") / "deepspeed" / f"{name}.json"
    return path if "/" not in name and os.path.isfile(path) else None


def _find(name: str, packaged: list[Packaged], kind: str) -> Path:
    path = Path(name)
    if os.path.isfile(name):
        return path
    by_name = {entry.name: entry.path for entry in packaged}
    if name in by_name:
        return by_name[name]
    if os.path.isdir(name):
        raise UsageError(f"{shown(name)}: is a folder; name a {kind} file")
    hint = nearest(name, by_name) or f"; packaged ones: {', '.join(by_name) or 'none'}"
    raise UsageError(f"{shown(name)}: no such {kind} file, and no packaged {kind} of that name{hint}")


def _title(path: Path) -> str:
    """The first comment line of the file."""
    with open(path, encoding="utf-8") as handle:
        first = handle.readline().rstrip(os.linesep)
    return first.lstrip("# ").strip() if first.startswith("#") else ""
