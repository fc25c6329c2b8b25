"""YAML with the line of every key, floats like 1e-4 read as numbers, and no key twice."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

import yaml

from sft.utils.errors import UsageError, shown

Path = tuple[str | int, ...]

# YAML 1.1, which PyYAML follows, wants a dot and a sign in `1e-4`; everybody writes it without.
_FLOAT = re.compile(
    r"""^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?(?:[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)
    |[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)
    |\.(?:nan|NaN|NAN))\Z""",
    re.VERBOSE,
)
# Decimal without leading zeros, hexadecimal, octal as Python writes it: `0123` and `1:30` are texts, not 83 and 90.
_INT = re.compile(r"^(?:[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F_]*[0-9a-fA-F]|0o[0-7_]*[0-7]|0b[01_]*[01])\Z")
_BOOL = re.compile(r"^(?:true|True|TRUE|false|False|FALSE)\Z")
_CORE = "tag:yaml.org,2002:"
_OURS = {"float": (_FLOAT, "-+0123456789."), "int": (_INT, "-+0123456789"), "bool": (_BOOL, "tTfF")}

MOST_VALUES = 50_000
"""Values of one recipe, its aliases and data recipes filled in. The largest packaged one has 2,000."""
MOST_LEVELS = 50
LARGEST = 2**63 - 1


class RecipeLoader(yaml.SafeLoader):
    """SafeLoader that reads 1e-4 as a number, and on/off/yes/no, dates, 0123 and 1:30 as the text they are."""


class RecipeDumper(yaml.SafeDumper):
    """SafeDumper that quotes what RecipeLoader, or another YAML reader, would read as something else."""


def _add_ours(kind: type[yaml.SafeLoader] | type[yaml.SafeDumper]) -> None:
    for name, (pattern, first) in _OURS.items():
        kind.add_implicit_resolver(_CORE + name, pattern, list(first))


_replaced = {_CORE + name for name in (*_OURS, "timestamp", "value")}
RecipeLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in _replaced]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_add_ours(RecipeLoader)
_add_ours(RecipeDumper)


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Unicode's line breaks are read as plain ones anywhere but in double quotes.
    escaped = any(char in text for char in "\r\x85\u2028\u2029\ufeff")
    return dumper.represent_scalar(_CORE + "str", text, style='"' if escaped else "|" if "\n" in text else None)


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
    return shown(text)


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
    """Parse `text`, which stands in the file called `name`. Raises UsageError with the line of what is wrong."""
    return _Parser(name).parse(text)


def parse_value(text: str, name: str) -> Any:
    """The value of the override called `name`: `2e-5` is a number, `[a, b]` a list, `true` a boolean, the rest text.

    Raises UsageError for a value that no recipe can hold.
    """
    stripped = text.strip()
    # `Run: two` is a title, and `see #3` has no comment: what isn't in brackets or quotes is one word of YAML, or text.
    one_word = stripped and not re.search(r"[\s#]", stripped)
    if not one_word and not stripped.startswith(("{", "[", '"', "'")):
        return readable(text, name) if stripped else None
    try:
        value = _Parser(name, lines=False).parse(text).value
    except NotYamlError:
        return readable(text, name)
    plain = isinstance(value, dict | list) and not stripped.startswith(("{", "["))
    return readable(text, name) if plain else value


class NotYamlError(UsageError):
    """A text that isn't YAML."""


def readable(value: Any, place: str) -> Any:
    """`value`, a scalar. Raises UsageError for one that no file and no computation can hold."""
    if isinstance(value, str):
        if any(0xD800 <= ord(char) < 0xE000 for char in value):
            raise UsageError(f"{place}: the text has bytes or escapes that aren't Unicode characters")
    elif isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"{place}: must be a finite number; put it in quotes if it is a text")
    elif isinstance(value, int) and abs(value) > LARGEST:
        raise UsageError(f"{place}: is a number beyond 64 bits; put it in quotes if it is a text")
    return value


class _Parser:
    """One text, made into plain Python with the origin of every value."""

    def __init__(self, name: str, *, lines: bool = True) -> None:
        self.name, self.lines, self.values = name, lines, 0
        self.origins: dict[Path, Origin] = {(): self._origin(0, ())}
        self.constructor = RecipeLoader("")

    def parse(self, text: str) -> Document:
        try:
            node = yaml.compose(text, Loader=RecipeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = self._origin(mark.line if mark else 0, ())
            raise NotYamlError(f"{place}: {error.problem or error.context} (not valid YAML)") from error
        except RecursionError:
            raise UsageError(f"{self.name}: is nested more than {MOST_LEVELS} levels deep") from None
        except yaml.YAMLError as error:
            raise NotYamlError(f"{self.name}: {str(error).splitlines()[0]} (not valid YAML)") from error
        return Document(None if node is None else self._value(node, (), ()), self.origins)

    def _origin(self, line: int, path: Path) -> Origin:
        return Origin(f"{self.name}:{line + 1}" if self.lines else self.name, path)

    def _place(self, node: yaml.Node, path: Path) -> Origin:
        return self._origin(node.start_mark.line, path)

    def _enter(self, node: yaml.Node, path: Path, around: tuple[int, ...]) -> tuple[int, ...]:
        self.values += 1
        if self.values > MOST_VALUES:
            raise UsageError(f"{self.name}: has more than {MOST_VALUES:,} values once its aliases are filled in")
        if id(node) in around:
            raise UsageError(f"{self._place(node, path)}: an alias stands inside its own anchor")
        if len(around) >= MOST_LEVELS:
            raise UsageError(f"{self._place(node, path[:8])}: is nested more than {MOST_LEVELS} levels deep")
        return (*around, id(node))

    def _value(self, node: yaml.Node, path: Path, around: tuple[int, ...]) -> Any:
        inside = self._enter(node, path, around)
        if isinstance(node, yaml.SequenceNode):
            items = []
            for index, child in enumerate(node.value):
                self.origins[(*path, index)] = self._place(child, (*path, index))
                items.append(self._value(child, (*path, index), inside))
            return items
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(node, path)
        result = {}
        for key, (key_node, child) in self._pairs(node, path, around).items():
            self.origins[(*path, key)] = self._place(key_node, (*path, key))
            result[key] = self._value(child, (*path, key), inside)
        return result

    def _scalar(self, node: yaml.Node, path: Path) -> Any:
        place = str(self._place(node, path))
        kind = node.tag.removeprefix(_CORE)
        if kind not in ("str", "int", "float", "bool", "null"):
            raise UsageError(f"{place}: the YAML tag {node.tag} has no meaning in a recipe")
        if kind == "int" and len(node.value) > 100:
            raise UsageError(f"{place}: is a number beyond 64 bits; put it in quotes if it is a text")
        try:
            text = node.value.replace("_", "")
            value = int(text, 0) if kind == "int" else self.constructor.construct_object(node)
        except (ValueError, KeyError, AttributeError) as error:
            raise UsageError(f"{place}: {node.value[:60]!r} can't be read as !!{kind}") from error
        return readable(value, place)

    def _pairs(self, node: yaml.MappingNode, path: Path, around: tuple[int, ...]) -> dict[str, tuple[Any, Any]]:
        """A mapping's own keys, then those that `<<` merges into it and that it doesn't have."""
        own: dict[str, tuple[Any, Any]] = {}
        merged: list[yaml.Node] = []
        for key_node, child in node.value:
            if key_node.tag == _CORE + "merge":
                merged += child.value if isinstance(child, yaml.SequenceNode) else [child]
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise UsageError(f"{self._place(key_node, path)}: a key must be a word")
            key = readable(key_node.value, str(self._place(key_node, path)))
            if key in own:
                first = own[key][0].start_mark.line + 1
                raise UsageError(f"{self._place(key_node, (*path, key))}: is set twice, first in line {first}")
            own[key] = (key_node, child)
        inside = self._enter(node, path, around) if merged else around
        for other in merged:
            if not isinstance(other, yaml.MappingNode):
                raise UsageError(f"{self._place(other, path)}: `<<` merges mappings")
            for key, pair in self._pairs(other, path, inside).items():
                own.setdefault(key, pair)
        return own
