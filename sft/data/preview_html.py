"""A prepared stage as one HTML page that needs nothing else."""

from __future__ import annotations

import os
from html import escape
from typing import Any

from sft.data.prepare import PreparedStage
from sft.data.segments import Document, documents_of
from sft.data.statistics import labelled, statistics
from sft.files import write_text

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td { padding: .15rem 1rem .15rem 0; } td + td { text-align: right; }
.layout { display: flex; height: 1.2rem; margin: .5rem 0; background: #eee; }
.layout i { background: #8fb4d9; border-right: 2px solid #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #fafafa; border: 1px solid #ddd; padding: .6rem; }
.trained { background: #cdeccd; } .context { color: #777; } .boundary { background: #ffe58a; }
h3 { font-size: 1rem; margin: 1rem 0 .2rem; }
@media (prefers-color-scheme: dark) {
  body { background: #1b1b1b; color: #ddd; } pre { background: #222; border-color: #444; } .context { color: #999; }
  .trained { background: #1d4a1d; } .boundary { background: #665200; } .layout { background: #333; }
}
"""


def write_page(
    prepared: PreparedStage, tokenizer: Any, path: str | os.PathLike[str], *, title: str = "stage", rows: int = 20
) -> None:
    """Write the statistics and the first `rows` rows to `path`, every document whole."""
    counts = "".join(
        f"<tr><td>{escape(label)}</td><td>{escape(value)}</td></tr>" for label, value in labelled(statistics(prepared))
    )
    room = prepared.manifest["recipe"]["max_length"] or 0
    shown = [
        _row(number, prepared.dataset[number], tokenizer, room) for number in range(min(rows, len(prepared.dataset)))
    ]
    legend = (
        '<p><span class="trained">trained</span> <span class="context">context</span> '
        '<span class="boundary">first token of a document, never trained</span></p>'
    )
    write_text(
        path,
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head><body>'
        f"<h1>{escape(title)}</h1><table>{counts}</table>{legend}{''.join(shown)}</body></html>\n",
    )


def _row(number: int, row: dict[str, Any], tokenizer: Any, room: int) -> str:
    total = max(room, len(row["input_ids"]))
    layout = "".join(
        f'<i style="width:{100 * length / total:.3f}%" title="{escape(name)}: {length} tokens"></i>'
        for length, name in zip(row["seq_lengths"], row["document_ids"], strict=True)
    )
    documents = "".join(_document(document) for document in documents_of(row, tokenizer))
    return (
        f"<h2>row {number}: {len(row['input_ids'])} tokens, {len(row['seq_lengths'])} documents</h2>"
        f'<div class="layout">{layout}</div>{documents}'
    )


def _document(document: Document) -> str:
    text = "".join(
        f'<span class="{segment.kind}" title="{segment.kind}: {len(segment.ids)} tokens">{escape(segment.text)}</span>'
        for segment in document.segments
    )
    return (
        f"<h3>{document.number}. {escape(document.name)}: {document.tokens} tokens, {document.trained} trained</h3>"
        f"<pre>{text}</pre>"
    )
