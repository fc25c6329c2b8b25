"""Answers of several parts: lists, sets, tuples, vectors and matrices, intervals, and inequalities as intervals."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from sft.answers.normal import unwrapped
from sft.answers.words import NOTHING, REALS

Kind = Literal["list", "set", "tuple", "vector"]
_LONGEST = 2000
_MATRIX = re.compile(
    r"[(\[]?\s?\\begin\{[pbB]?(?:small)?(?:matrix|array)\}(?:\{[lcr| ]*\})?(.*)"
    r"\\end\{[pbB]?(?:small)?(?:matrix|array)\}\s?[)\]]?"
)
_NAME = r"(?:\\text\s?\{[\w ]{1,40}\}|\\?[A-Za-z]+|[A-Za-z]_\{?\w\}?|[A-Za-z]\([A-Za-z]\)"
_NAME += r"|\([A-Za-z](?:,\s?[A-Za-z]){1,3}\))"
_ASSIGNED = re.compile(rf"({_NAME})\s?(?:=|\\in(?![A-Za-z]))\s?(?![=<>])(.+)", re.DOTALL)
_BETWEEN = re.compile(r",?\s?\b(?:and|or)\b\s?|[,;]")
_OR, _ORDER = (
    re.compile(r"(?:,?\s?(?:\bor\b|\\lor(?![A-Za-z])|\\vee(?![A-Za-z])|\\cup(?![A-Za-z]))|,)\s?"),
    re.compile(r"\\(?:le|ge|ne)(?![A-Za-z])|[<>]"),
)
_GROUPED, _SPACED = re.compile(r"(?<=\d),(?=\d{3}(?!\d))"), re.compile(r", |(?:and|or)\b")
_AND = re.compile(r",?\s?(?:\band\b|\\l?and(?![A-Za-z])|\\wedge(?![A-Za-z]))\s?")
_TRANSPOSED = re.compile(r"(.+[)\]}])\s?\^\s?\{?(?:T|\\top|\\intercal|\\mathsf\{T\})\}?", re.DOTALL)
_BUILDER = re.compile(r"\\\{\s?([A-Za-z])(?:\s?\\in\s?\\mathbb\{?R\}?)?\s?(?:\||:|\\mid|\\colon)\s?(.+)\\\}")
_TURNED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", r"\ne": r"\ne"}
_VARIABLE = re.compile(r"[A-Za-z]|\\[a-z]+")
# The point P(1, 2); the unit vectors of 2i - 3j, which are dressed as such.
_POINT = re.compile(r"(?:[A-Z]\s?(?=\())?")
_BASIS = re.compile(r"\\(?:hat|vec|math(?:bf|rm)|boldsymbol|bm)[\s{]{0,2}\\?([ijk])(?:math)?(?![A-Za-z])\s?\}?")
_OPEN, _CLOSE = "([{", ")]}"


@dataclass(frozen=True)
class Parts:
    """An answer's parts; `ends` are its brackets (a set's and a list's: none)."""

    kind: Kind
    items: tuple[str, ...]
    ends: str = ""

    @property
    def ordered(self) -> bool:
        return self.kind in ("tuple", "vector")


def parts_of(text: str) -> Parts | None:
    """The parts of a normal text, or None where it is one thing. Time is linear in the text."""
    if len(text) > _LONGEST:
        return None
    turned = _TRANSPOSED.fullmatch(text)
    row = parts_of(turned[1]) if turned else None
    if row and row.ordered and not any(item.startswith(("[", "(")) for item in row.items):
        return Parts("vector", row.items)
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[1])
    plain = " ".join(unwrapped(text).split()).removesuffix(".")
    if NOTHING.fullmatch(plain):
        return Parts("set", ())
    inner = _inside(plain, r"\{", r"\}")
    if inner is not None:
        return None if re.search(r"\||:|\\mid", inner) else Parts("set", tuple(split(inner)))
    point = plain[_POINT.match(plain).end() :]  # type: ignore[union-attr]
    if len(point) > 2 and point[0] in "([]" and point[-1] in ")][" and (found := _bracketed(point)):
        return found
    based = _BASIS.split(text)
    if len(based) > 3 and not based[-1].strip():
        return _combined(based)
    items = split(plain)
    if len(items) > 1:
        return Parts("list", tuple(items))
    return Parts("list", tuple(_both_signs(plain))) if r"\pm" in plain else None


def assigned(text: str) -> tuple[str, str] | None:
    r"""(name, value) of `x = 5`, `f(x) = 5`, `(x, y) = (1, 2)`, `x \in (1, 2)`; None for any other equation."""
    match = _ASSIGNED.fullmatch(text)
    return (match[1].replace(" ", ""), match[2].strip()) if match and "=" not in match[2] else None


def as_interval(text: str) -> tuple[str, str] | None:
    r"""(variable, interval) of inequalities in one variable: `1 < x \le 2`, `x < 2 or x > 3`; None for all else."""
    if len(text) > _LONGEST:
        return None
    text = unwrapped(text).strip()
    builder = _BUILDER.fullmatch(text)
    text = builder[2].strip() if builder else text
    real, _, excluded = text.partition(" except ")
    if REALS.fullmatch(real) and len(real) > 1:
        return "", _without(excluded)
    if not _ORDER.search(text):
        return None
    both = _AND.split(text)
    pieces, joint = (both, r" \cap ") if len(both) > 1 else (_OR.split(text), r" \cup ")
    if _ORDER.findall(text) == [r"\ne"]:
        pieces = [text]
    found = [_one_interval(piece.strip()) for piece in pieces]
    names = {piece[0] for piece in found if piece}
    if None in found or len(names) != 1:
        return None
    return names.pop(), joint.join(piece[1] for piece in found if piece)


def _one_interval(text: str) -> tuple[str, str] | None:
    signs, sides = _ORDER.findall(text), [side.strip() for side in _ORDER.split(text)]
    if len(signs) == 1 and _VARIABLE.fullmatch(sides[1]) and not _VARIABLE.fullmatch(sides[0]):
        sides, signs = sides[::-1], [_TURNED[signs[0]]]
    if len(signs) == 1 and _VARIABLE.fullmatch(sides[0]):
        name, value = sides
        left = {"<": rf"(-\infty,{value})", r"\le": rf"(-\infty,{value}]", ">": rf"({value},\infty)"}
        return name, (left | {r"\ge": rf"[{value},\infty)", r"\ne": _without(value)})[signs[0]]
    if len(signs) != 2 or not _VARIABLE.fullmatch(sides[1]):
        return None
    if set(signs) <= {">", r"\ge"}:
        sides, signs = sides[::-1], [_TURNED[sign] for sign in signs[::-1]]
    if not set(signs) <= {"<", r"\le"}:
        return None
    return sides[1], f"{'(' if signs[0] == '<' else '['}{sides[0]},{sides[2]}{')' if signs[1] == '<' else ']'}"


def _without(values: str) -> str:
    """The real numbers but for these, if any."""
    return r"(-\infty,\infty)" + (rf" \setminus \{{{','.join(split(values))}\}}" if values else "")


def split(text: str, between: re.Pattern[str] = _BETWEEN) -> list[str]:
    """`text` at its commas, semicolons, `and` and `or` that stand in no bracket."""
    depth, start, found = 0, 0, []
    cuts = {match.start(): match.end() for match in between.finditer(text)}
    # In `1,000, 2,000` and `1,000 or 2,000` a comma without a space is no cut.
    for grouped in _GROUPED.finditer(text) if _SPACED.search(text) else ():
        cuts.pop(grouped.start(), None)
    for place, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth <= 0 and place >= start and place in cuts:
            found.append(text[start:place].strip())
            start = cuts[place]
    found.append(text[start:].strip())
    return [signed for item in found if item for signed in _both_signs(item)]


def _both_signs(item: str) -> list[str]:
    if r"\pm" not in item or r"\mp" in item or item.count(r"\pm") > 1:
        return [item]
    name = assigned(item)
    value = name[1] if name else item
    return [value.replace(r"\pm", sign).strip().removeprefix("+").strip() for sign in "+-"]


def _matrix(inner: str) -> Parts:
    rows = [
        [cell.strip() for cell in row.split("&")] for row in re.split(r"\\\\(?:\[[^\]]{0,9}\])?", inner) if row.strip()
    ]
    if len(rows) == 1 or all(len(row) == 1 for row in rows):
        return Parts("vector", tuple(cell for row in rows for cell in row))
    return Parts("vector", tuple(f"[{','.join(row)}]" for row in rows))


def _combined(based: list[str]) -> Parts:
    """`2 i - 3 j` in its pieces: a factor, a unit vector, a factor, and so on."""
    factors = {
        name: factor.replace(" ", "").removeprefix("+") for factor, name in zip(based[::2], based[1::2], strict=False)
    }
    factors = {name: f"{factor}1" if factor in ("", "-") else factor for name, factor in factors.items()}
    return Parts("vector", tuple(factors.get(name, "0") for name in ("ijk" if "k" in factors else "ij")))


def _inside(text: str, left: str, right: str) -> str | None:
    """What one pair of brackets holds, where it holds all of `text`."""
    if not (text.startswith(left) and text.endswith(right)) or left in text[len(left) :]:
        return None
    return text[len(left) : -len(right)].strip()


def _bracketed(text: str) -> Parts | None:
    """`(a, b)`, `[a, b)`, and `]a, b[`, whose brackets are turned."""
    inner = text[1:-1]
    depth = lowest = 0
    for character in inner:
        depth += (character in _OPEN) - (character in _CLOSE)
        lowest = min(lowest, depth)
    if lowest < 0 or depth:
        return None
    items = split(inner)
    ends = ("(" if text[0] == "]" else text[0]) + (")" if text[-1] == "[" else text[-1])
    if len(items) < 2 or (len(items) != 2 and ends not in ("()", "[]")):
        return None
    return Parts("vector" if len(items) > 2 or items[0].startswith(("(", "[")) else "tuple", tuple(items), ends)
