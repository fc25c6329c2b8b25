"""A prepared stage on the terminal: its numbers, and rows with trained and context tokens told apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from sft.data.engine.accounts import funnel_lines, funnel_table
from sft.data.look.bar import bar
from sft.data.look.find import cut_lengths, first_cut, same_row
from sft.data.look.pieces import Document, documents_of
from sft.data.look.statistics import document_lengths, histogram, labelled, statistics
from sft.data.prepare import PreparedStage
from sft.utils.tables import counted

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

STYLES = {"trained": "bold green", "context": "dim", "boundary": "black on yellow"}
# Without colour the trained text stands between marks, as in wdiff.
MARKS = {"trained": ("{+", "+}"), "context": ("", ""), "boundary": ("", "")}
BINS = 12
BAR = 60
CUT_SHOWN = 5
COLUMNS_SHOWN = 10


def show_numbers(prepared: PreparedStage, console: Console, title: str = "") -> None:
    """Print the stage's statistics, and what became of the rows that it was made from."""
    from rich.table import Table

    table = Table(title=title or None, show_header=False, title_justify="left")
    for label, value in labelled(statistics(prepared)):
        table.add_row(label, value)
    console.print(table)
    console.print(str(prepared.path), markup=False)
    for line in columns_told(prepared.manifest):
        console.print(line, markup=False)
    console.print()
    console.print(funnel_table(funnel_lines(prepared.manifest), console.width))


def columns_told(manifest: dict[str, Any]) -> Iterator[str]:
    """A line for each source: which of its columns is what, and which aren't read."""
    for source in manifest["inputs"]:
        used = ", ".join(role if role == name else f"{role} is {name}" for role, name in source["columns"].items())
        names = source["unread"]
        more = f" and {len(names) - COLUMNS_SHOWN} more" if len(names) > COLUMNS_SHOWN else ""
        unread = f"; not read: {', '.join(names[:COLUMNS_SHOWN])}{more}" if names else ""
        if used:
            yield f"{source['source']}: {used}{unread}"


def show_lengths(prepared: PreparedStage, console: Console) -> None:
    """Print how long the documents are, and which were cut at max_length."""
    bins = histogram(document_lengths(prepared), BINS)
    most = max((count for _, _, count in bins), default=0)
    console.print("\nlengths of the documents, in tokens", style="italic")
    for start, end, count in bins:
        # At least a thin mark where there is anything.
        full = "\u2588" * round(40 * count / most) or ("\u258f" if count else "")
        console.print(f"{start:>7,} to {end - 1:<7,} {full} {count:,}", markup=False)
    truncated = prepared.manifest["funnel"]["truncated"]
    if truncated:
        named = ", ".join(f"{name} ({tokens:,})" for name, tokens in first_cut(prepared, CUT_SHOWN))
        more = f" and {truncated - CUT_SHOWN:,} more" if truncated > CUT_SHOWN else ""
        limit = prepared.manifest["recipe"]["max_length"]
        console.print(f"\n\u2702 cut at {limit:,} tokens (tokens they had): {named}{more}", markup=False)


def show_rows(
    prepared: PreparedStage,
    tokenizer: Any,
    numbers: Iterable[int],
    console: Console,
    *,
    max_characters: int = 4000,
    only: str | None = None,
) -> None:
    """Print the rows `numbers`: how their documents lie in them, and every document, or those of the row `only`.

    Of a stretch longer than `max_characters` the beginning and the end are shown. Where the console has no colour,
    trained text stands between `{+` and `+}`.
    """
    colour = console.color_system is not None and not console.no_color
    room = prepared.manifest["recipe"]["max_length"] if prepared.manifest["recipe"]["packing"] else 0
    legend = "trained tokens are green, context is dim" if colour else "trained tokens stand between {+ and +}"
    legend += "; in the bar each block is a document, dots are free room, \u2702 is one cut at max_length"
    console.print(f"\n{legend}", markup=False)
    for number in numbers:
        row = prepared.dataset[number]
        cut = cut_lengths(prepared, [row])
        of = f" of {room:,}" if room else ""
        console.print(
            f"\nrow {number} of {len(prepared.dataset)}: {len(row['input_ids']):,}{of} tokens in "
            f"{counted(len(row['seq_lengths']), 'document')}",
            markup=False,
        )
        marks = [pair in cut for pair in zip(row["document_ids"], row["seq_lengths"], strict=True)]
        console.print(bar(row["seq_lengths"], marks, room, min(BAR, console.width - 2), colour), soft_wrap=True)
        for document in documents_of(row, tokenizer, cut):
            if only is None or same_row(document.name, only):
                _print_document(document, max_characters, colour, console)


def _print_document(document: Document, max_characters: int, colour: bool, console: Console) -> None:
    header = f"-- document {document.number}: {document.name}: {document.tokens} tokens, {document.trained} trained"
    if document.missing:
        header += f", cut at max_length: it had {document.whole}"
    console.print(header, style="yellow" if colour else None, markup=False)
    text = _coloured(document, max_characters, colour)
    if document.missing:
        text.append(f"\n\u2702 {document.missing} tokens are cut off here", style="bold red" if colour else None)
    console.print(text, soft_wrap=True)


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
