"""A prepared stage on the terminal: its numbers, and rows with trained and context tokens told apart."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sft.data.prepare import PreparedStage
from sft.data.segments import Document, documents_of
from sft.data.statistics import labelled, statistics

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLES = {"trained": "bold green", "context": "dim", "boundary": "black on yellow"}
# Without colour the trained text stands between marks, as in wdiff.
MARKS = {"trained": ("{+", "+}"), "context": ("", ""), "boundary": ("", "")}


def show(
    prepared: PreparedStage,
    tokenizer: Any,
    *,
    title: str = "",
    rows: int = 2,
    max_characters: int = 4000,
    console: Console | None = None,
) -> None:
    """Print the stage's statistics and its first `rows` rows.

    Of a stretch longer than `max_characters` the beginning and the end are shown. Where the console has no colour,
    trained text stands between `{+` and `+}`.
    """
    from rich.console import Console

    console = console or Console(highlight=False, soft_wrap=True)
    _print_statistics(prepared, title, console)
    colour = console.color_system is not None and not console.no_color
    legend = "trained tokens are green, context is dim" if colour else "trained tokens stand between {+ and +}"
    for number in range(min(rows, len(prepared.dataset))):
        row = prepared.dataset[number]
        console.print(
            f"\nrow {number} of {len(prepared.dataset)}: {len(row['input_ids'])} tokens in {len(row['seq_lengths'])} "
            f"documents; {legend}",
            markup=False,
        )
        for document in documents_of(row, tokenizer):
            _print_document(document, max_characters, colour, console)


def _print_statistics(prepared: PreparedStage, title: str, console: Console) -> None:
    from rich.table import Table

    table = Table(title=title or None, show_header=False, title_justify="left")
    for label, value in labelled(statistics(prepared)):
        table.add_row(label, value)
    console.print(table)
    console.print(str(prepared.path), markup=False)


def _print_document(document: Document, max_characters: int, colour: bool, console: Console) -> None:
    header = f"-- document {document.number}: {document.name}: {document.tokens} tokens, {document.trained} trained "
    console.print(header, style="yellow" if colour else None, markup=False)
    console.print(_coloured(document, max_characters, colour), soft_wrap=True)


def _coloured(document: Document, max_characters: int, colour: bool) -> Text:
    from rich.text import Text

    text = Text()
    for segment in document.segments:
        before, after = ("", "") if colour else MARKS[segment.kind]
        shown = before + _shortened(segment.text, max_characters) + after
        text.append(shown, style=STYLES[segment.kind] if colour else None)
    return text


def _shortened(text: str, limit: int) -> str:
    if len(text) <= limit + limit // 4:
        return text
    head, tail = text[: limit - limit // 2], text[len(text) - limit // 2 :]
    return f"{head}\n... {len(text) - limit} characters not shown ...\n{tail}"
