"""A prepared stage as one HTML page that needs nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from sft.data.engine.accounts import FunnelLine, funnel_lines
from sft.data.look.bar import COLOURS
from sft.data.look.find import cut_lengths, first_cut
from sft.data.look.pieces import Document, documents_of
from sft.data.look.statistics import document_lengths, histogram, labelled, statistics
from sft.data.prepare import PreparedStage
from sft.utils.files import write_text

BINS = 40
MAP_ROWS = 40  # rows whose layout is shown
CUT_SHOWN = 60
FOLDED = 2000  # documents of more tokens begin folded


def write_page(
    prepared: PreparedStage,
    tokenizer: Any,
    path: str | os.PathLike[str],
    *,
    title: str = "stage",
    numbers: Iterable[int] | None = None,
    figures: Mapping[str, tuple[str, str]] | None = None,
    head: str = "",
) -> None:
    """Write the stage's numbers and its rows `numbers` (default: the first 20) to `path`, every document whole.

    `figures`: name -> (HTML, caption) of what is drawn of the funnel; `head`: the style and script that they need.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    chosen = range(min(20, len(prepared.dataset))) if numbers is None else list(numbers)
    content = {"title": title, "figures": figures or {}, "head": head, "folded": FOLDED, **_numbers(prepared)}
    content |= _rows(prepared, tokenizer, list(chosen))
    write_text(path, environment.get_template("preview.html.j2").render(content) + "\n")


def _numbers(prepared: PreparedStage) -> dict[str, Any]:
    """What the page says of the stage as a whole."""
    manifest = prepared.manifest
    lines, bins = funnel_lines(manifest), histogram(document_lengths(prepared), BINS)

    def examples(line: FunnelLine, reason: str) -> list[dict[str, str]]:
        return line.examples.get(reason, [])

    return {
        "counts": labelled(statistics(prepared)),
        "lines": lines,
        "widest": max(*(line.rows_out + line.dropped for line in lines), 1),
        "examples": examples,
        "bins": bins,
        "most": max((count for _, _, count in bins), default=1),
        "truncated": manifest["funnel"]["truncated"],
        "max_length": manifest["recipe"]["max_length"],
        "packing": manifest["recipe"]["packing"],
        "total": manifest["packs"],
    }


def _rows(prepared: PreparedStage, tokenizer: Any, numbers: list[int]) -> dict[str, Any]:
    """The rows token by token, and how these and some more are laid out."""
    # Those whose tokens are shown come first, so that each bar that can be followed is there.
    mapped = list(dict.fromkeys([*numbers, *range(min(MAP_ROWS, len(prepared.dataset)))]))[
        : max(MAP_ROWS, len(numbers))
    ]
    places = prepared.dataset.select_columns(["document_ids", "seq_lengths"])
    layouts = [places[number] for number in sorted(mapped)]
    cut = cut_lengths(prepared, layouts)
    longest = max((sum(row["seq_lengths"]) for row in layouts), default=1)
    room = prepared.manifest["recipe"]["max_length"] if prepared.manifest["recipe"]["packing"] else longest
    shown, anchors = [], {}
    for number in numbers:
        row = prepared.dataset[number]
        documents = list(documents_of(row, tokenizer, cut))
        blocks = _blocks(number, row, cut, room, True)
        shown.append({"number": number, "tokens": len(row["input_ids"]), "documents": documents, "blocks": blocks})
        anchors.update({document.name: _anchor(number, document) for document in documents if document.missing})
    known = [(name, tokens, anchors.get(name)) for name, tokens in first_cut(prepared, CUT_SHOWN)]
    layout = [
        (number, _blocks(number, row, cut, room, number in numbers))
        for number, row in zip(sorted(mapped), layouts, strict=True)
    ]
    return {"rows": shown, "cut": known, "map": layout}


def _anchor(number: int, document: Document) -> str:
    return f"row-{number}-{document.number}"


def _blocks(
    number: int, row: Mapping[str, Any], cut: Mapping[tuple[str, int], int], room: int, linked: bool
) -> list[dict[str, Any]]:
    """A block for each document of a row, in its order."""
    blocks = []
    for index, (name, length) in enumerate(zip(row["document_ids"], row["seq_lengths"], strict=True)):
        whole = cut.get((name, length))
        title = f"{name}: {length:,} tokens" + ("" if whole is None else f", cut: it had {whole:,}")
        blocks.append(
            {
                "style": f"d{index % len(COLOURS)}" if whole is None else "cut",
                "percent": 100 * length / room,
                "title": title,
                "anchor": f"row-{number}-{index + 1}" if linked else None,
            }
        )
    return blocks
