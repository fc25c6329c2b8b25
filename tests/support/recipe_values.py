"""Values for every key of the recipe's schema, made from the schema itself, so that a new key is covered too."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from hypothesis import strategies as st
from pydantic.fields import FieldInfo

from sft.recipe.problems import Section

TEXTS = [
    *("", " ", "~", "null", "Null", "true", "yes", "off", "12", "0123", "0x10", "0o17", "1:30", "1_000", "1e-4", ".5"),
    *("-", "- a", "a: b", "a #b", "# no", "=", "<<", "*x", "&x", "!x", "|", ">", "%", "@", "`", "?", "{a: 1}", "[1]"),
    *("${x}", "$${x}", "$$${x}", "a ${x} b $${step}$.", "$", "$$", "${", "{prompt} as $${step}$.", "${1}", "$ {x}"),
    *("two\nlines", "\n", "a\n", "\n\na", " a\n b", "a\r\nb", "a\tb", "\x85", "a\u2028b", "\ufeff", "\xa0", "\x07"),
    *("'", '"', "'\"", "\\", "\\n", "\\boxed{}", "é “”", "日本", "😀", "2001-01-01", "2001-01-01T00:00:00Z", ".inf"),
    *("word " * 60, "x" * 300, "'" * 3, "a: 'b'", "...", "---", "{prompt}", "{completion} $${prompt}"),
]
"""Texts that YAML, or the recipe's variables, would like to read as something else."""

texts = st.sampled_from(TEXTS) | st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**63) + 1, 2**63 - 1)
anything = st.recursive(
    st.none() | st.booleans() | numbers | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


def sections(kind: type[Section], seen: dict[str, type[Section]] | None = None) -> dict[str, type[Section]]:
    """Every section that a value of `kind` may hold, itself included, by name."""
    seen = {} if seen is None else seen
    if kind.__name__ not in seen:
        seen[kind.__name__] = kind
        for field in kind.model_fields.values():
            for inner in _sections_in(field.annotation):
                sections(inner, seen)
    return seen


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        if issubclass(annotation, Section):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _sections_in(argument)


def values(field: FieldInfo) -> st.SearchStrategy[Any] | None:
    """Values of a field's type; None for a field that holds other sections, whose own fields are covered instead."""
    return None if any(_sections_in(field.annotation)) else _of(field.annotation, tuple(field.metadata))


def _of(annotation: Any, limits: tuple[Any, ...]) -> st.SearchStrategy[Any]:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _of(arguments[0], (*limits, *arguments[1:]))
    if origin in (Union, types.UnionType):
        return st.one_of(*(_of(argument, limits) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    low, high = _bound(limits, Ge, Gt), _bound(limits, Le, Lt)
    if annotation is int:
        least = -(2**63) + 1 if low is None else int(low) + any(isinstance(limit, Gt) for limit in limits)
        return st.integers(least, 2**63 - 1 if high is None else int(high))
    if annotation is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False).filter(lambda x: low is None or x > low)
    simple = {bool: st.booleans(), type(None): st.none(), Any: anything}
    if annotation in simple:
        return simple[annotation]
    fewest, most = _bound(limits, MinLen), _bound(limits, MaxLen)
    if annotation is str:
        pattern = next((limit.pattern for limit in limits if getattr(limit, "pattern", None)), None)
        if pattern:
            return st.from_regex(pattern, fullmatch=True).map(lambda text: text.strip(".\n")[:most])
        return texts.filter(lambda text: len(text) >= (fewest or 0))
    if origin is list:
        return st.lists(_of(arguments[0], ()), min_size=fewest or 0, max_size=min(most or 3, 3))
    if origin is dict:
        return st.dictionaries(_of(arguments[0], ()), _of(arguments[1], ()), min_size=fewest or 0, max_size=3)
    raise AssertionError(f"no values are known for {annotation}")


def _bound(limits: tuple[Any, ...], *kinds: type) -> Any:
    names = {Ge: "ge", Gt: "gt", Le: "le", Lt: "lt", MinLen: "min_length", MaxLen: "max_length"}
    found = [getattr(limit, names[kind]) for limit in limits for kind in kinds if isinstance(limit, kind)]
    return found[0] if found else None
