"""YAML with the line of every key, floats like 1e-4 read as numbers, and no key twice."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import yaml

from sft.utils.errors import UsageError

Path = tuple[str | int, ...]

# YAML 1.1, which PyYAML follows, wants a dot and a sign in `1e-4`; everybody writes it without.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))$""",
    re.VERBOSE,
)


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, and on/off/yes/no and dates as the text they are."""


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes what RecipeLoader would read as something else."""


def _resolvers(source: dict[str, list[tuple[str, re.Pattern[str]]]]) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    replaced = {"tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp", "tag:yaml.org,2002:bool"}
    return {first: [pair for pair in pairs if pair[0] not in replaced] for first, pairs in source.items()}


for _class in (RecipeLoader, RecipeDumper):
    _class.yaml_implicit_resolvers = _resolvers(yaml.SafeLoader.yaml_implicit_resolvers)
    _class.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+0123456789."))
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
    )


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


RecipeDumper.add_representer(str, _represent_str)


@dataclass(frozen=True)
class Origin:
    """Where a value was written: `recipe.yaml:12` and its path there, or an override."""

    place: str
    path: Path

    def __str__(self) -> str:
        return f"{self.place}: {show_path(self.path)}" if self.path else self.place


def show_path(path: Path) -> str:
    """`stages[1].train.max_steps`."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


@dataclass
class Document:
    """A YAML value as plain Python, and the origin of every path in it."""

    value: Any
    origins: dict[Path, Origin]

    def at(self, path: Path) -> Any:
        """The value at `path`."""
        value = self.value
        for part in path:
            value = value[part]
        return value

    def origin(self, path: Path) -> Origin:
        """The origin of `path`, or of the nearest thing around it, named by the whole path."""
        for length in range(len(path), -1, -1):
            found = self.origins.get(path[:length])
            if found is not None:
                return replace(found, path=found.path + path[length:])
        return Origin("recipe", path)


def parse_document(text: str, name: str) -> Document:
    """Parse `text`, which stands in the file called `name`. Raises UsageError with the line of a syntax error."""
    loader = None
    try:
        loader = RecipeLoader(text)
        node = loader.get_single_node()
        origins: dict[Path, Origin] = {(): Origin(f"{name}:1", ())}
        value = None if node is None else _construct(loader, node, (), name, origins)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise UsageError(f"{name}{line}: {error.problem or error.context} (not valid YAML)") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{name}: {str(error).splitlines()[0]} (not valid YAML)") from error
    finally:
        if loader is not None:
            loader.dispose()
    return Document(value, origins)


def parse_value(text: str) -> Any:
    """The value of an override: `2e-5` is a number, `[a, b]` a list, `true` a boolean, the rest text."""
    try:
        value = yaml.load(text, Loader=RecipeLoader)
    except yaml.YAMLError:
        return text
    # `Run: two` is a title; a mapping or list is written with its brackets.
    return text if isinstance(value, dict | list) and not text.lstrip().startswith(("{", "[")) else value


def _construct(
    loader: RecipeLoader,
    node: yaml.Node,
    path: Path,
    name: str,
    origins: dict[Path, Origin],
    open_nodes: tuple[int, ...] = (),
) -> Any:
    if id(node) in open_nodes:
        raise yaml.MarkedYAMLError(problem="an alias inside its own anchor", problem_mark=node.start_mark)
    inside = (*open_nodes, id(node))
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            origins[(*path, index)] = Origin(f"{name}:{child.start_mark.line + 1}", (*path, index))
        return [_construct(loader, child, (*path, i), name, origins, inside) for i, child in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    result: dict[str, Any] = {}
    lines: dict[str, int] = {}
    written = [pair for pair in node.value if pair[0].tag != "tag:yaml.org,2002:merge"]
    loader.flatten_mapping(node)
    own = {id(key) for key, _ in written}
    for key_node, child in sorted(node.value, key=lambda pair: id(pair[0]) not in own):
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        line = key_node.start_mark.line + 1
        if key is None:
            raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
        if key in lines:
            if id(key_node) not in own:
                continue
            raise UsageError(f"{name}:{line}: {show_path((*path, key))}: is set twice, first in line {lines[key]}")
        lines[key] = line
        origins[(*path, key)] = Origin(f"{name}:{line}", (*path, key))
        result[key] = _construct(loader, child, (*path, key), name, origins, inside)
    return result
