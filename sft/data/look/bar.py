"""How the documents of a packed row lie beside each other, as a bar of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

COLOURS = ("cyan", "magenta", "blue", "green")
CUT_COLOUR = "red"
# Without colour neighbours differ by their shade; free room is dots.
SHADES = ("\u2588", "\u2592")
FREE = "\u00b7"
CUT = "\u2702"


def cells(lengths: Sequence[int], room: int, width: int) -> list[int | None]:
    """Of each of `width` cells of a row with room for `room` tokens: the index of the document there, None: free."""
    ends, total = [], 0
    for length in lengths:
        total += length
        ends.append(total)
    found: list[int | None] = []
    index = 0
    for cell in range(width):
        middle = (cell + 0.5) * max(room, total) / width
        while index < len(ends) and ends[index] <= middle:
            index += 1
        found.append(index if index < len(ends) else None)
    return found


def bar(lengths: Sequence[int], cut: Sequence[bool], room: int, width: int, colour: bool) -> Text:
    """The row as one line; the last cell of a document that was cut at max_length is a pair of scissors."""
    from rich.text import Text

    text, row = Text("\u2595"), cells(lengths, room, width)
    for cell, index in enumerate(row):
        if index is None:
            text.append(FREE, style="dim" if colour else None)
            continue
        last = cell + 1 == width or row[cell + 1] != index
        shade = SHADES[0] if colour else SHADES[index % 2]
        style = CUT_COLOUR if cut[index] else COLOURS[index % len(COLOURS)]
        text.append(CUT if cut[index] and last else shade, style=style if colour else None)
    return text.append("\u258f")
