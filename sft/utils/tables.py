"""Tables for the terminal whose numbers stay whole however narrow it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

_GAP = 2


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 row`, `2 rows`; `many`: the plural, where it isn't made by an s."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def numbers_table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    text: Mapping[str, int],
    optional: Sequence[str] = (),
    title: str | None = None,
    width: int | None = None,
) -> Table:
    """A table whose columns named in `text` are folded where there is little room, and whose numbers never are.

    `text`: with the characters that each should have. `optional`: columns that go, the first first, where `width`
    characters can't hold all.
    """
    from rich.table import Table

    widths = [max(len(cells[place]) for cells in (head, *rows)) for place in range(len(head))]
    needed = [min(wide, text.get(name, wide)) for name, wide in zip(head, widths, strict=True)]
    shown = list(range(len(head)))
    for name in optional:
        if width is not None and sum(needed[place] + _GAP for place in shown) - _GAP > width:
            shown.remove(head.index(name))
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), title=title, title_justify="left")
    for place in shown:
        if head[place] in text:
            table.add_column(head[place], overflow="fold")
        else:
            table.add_column(head[place], justify="right", no_wrap=True)
    for cells in rows:
        table.add_row(*(cells[place] for place in shown))
    return table
