"""The preview shows what is trained, with and without colour, on the terminal and as a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from sft.data.prepare import PreparedStage
from sft.data.preview import show
from sft.data.preview_html import write_page
from sft.data.segments import documents_of
from sft.data.statistics import document_lengths, statistics

ROWS = [
    {
        "messages": [
            {"role": "user", "content": "1+1?"},
            {"role": "assistant", "content": "<think>\n[red]easy[/]\n</think>2"},
            {"role": "user", "content": "\x1b[31m <b>3</b>"},
            {"role": "assistant", "content": "\u00e9 & \U0001f600"},
        ]
    },
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 50}]},
]


@pytest.fixture
def prepared(prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path]) -> PreparedStage:
    return prepare(write_rows(ROWS), train={"max_length": 200, "packing": True})


def _shown(prepared: PreparedStage, tokenizer: Any, colour: bool, **keys: Any) -> str:
    out = io.StringIO()
    console = Console(
        file=out, force_terminal=colour, no_color=not colour, color_system="truecolor" if colour else None, width=200
    )
    show(prepared, tokenizer, console=console, **keys)
    return out.getvalue()


def test_segments_are_the_mask_that_is_stored(prepared: PreparedStage, toy: Any) -> None:
    for row in prepared.dataset:
        documents = list(documents_of(row, toy))
        ids = [i for document in documents for segment in document.segments for i in segment.ids]
        mask = [int(s.kind == "trained") for document in documents for s in document.segments for _ in s.ids]
        assert ids == row["input_ids"] and mask == row["assistant_masks"]
        assert [document.tokens for document in documents] == row["seq_lengths"]
        assert all(document.segments[0].kind == "boundary" for document in documents)


def test_segments_are_the_labels_that_the_trainer_makes(prepared: PreparedStage, toy: Any) -> None:
    collator = pytest.importorskip("sft.train.collator")
    rows = list(prepared.dataset)
    labels = collator.PackedCollator(pad_token_id=toy.pad_token_id)(rows)["labels"].numpy().ravel()
    kinds = [s.kind for row in rows for d in documents_of(row, toy) for s in d.segments for _ in s.ids]
    assert np.array_equal(labels != -100, np.array(kinds) == "trained")
    assert (labels != -100).sum() == prepared.manifest["supervised_tokens"]


def test_plain_text_marks_what_is_trained(prepared: PreparedStage, toy: Any) -> None:
    shown = _shown(prepared, toy, colour=False)
    trained = re.findall(r"\{\+(.*?)\+\}", shown, re.DOTALL)
    assert trained == [
        " and ",  # the legend
        "<think>\n[red]easy[/]\n</think>2<|end|>",
        "\u00e9 & \U0001f600<|end|><|endoftext|>",
        "a" * 50 + "<|end|><|endoftext|>",
    ]
    assert "\x1b" not in shown and "\\x1b[31m" in shown
    assert re.search(r"trained tokens .* 94 ", shown) and "document 2: rows.jsonl:2: 56 tokens, 52 trained" in shown


def test_colours(prepared: PreparedStage, toy: Any) -> None:
    shown = _shown(prepared, toy, colour=True)
    assert "{+" not in shown and "\x1b[1;32m" + "a" * 50 in shown and "\x1b[2m" in shown


def test_long_stretches_are_shortened(prepared: PreparedStage, toy: Any) -> None:
    shown = _shown(prepared, toy, colour=False, max_characters=28)
    assert (
        "characters not shown ..." in shown and "{+" + "a" * 14 + "\n... 42 " in shown and "\n><|endoftext|>+}" in shown
    )


def test_statistics(prepared: PreparedStage) -> None:
    counts = statistics(prepared)
    lengths = document_lengths(prepared)
    assert sorted(lengths.tolist()) == sorted(n for row in prepared.dataset for n in row["seq_lengths"])
    assert (counts.rows_read, counts.documents, counts.packs) == (2, 2, 1)
    assert counts.fill == counts.tokens / 200
    assert counts.percentiles[0] == lengths.min() and counts.percentiles[100] == lengths.max() == counts.percentiles[99]


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.trained: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        self.inside = tag == "span" and ("title" in dict(attrs)) and dict(attrs).get("class") == "trained"
        if self.inside:
            self.trained.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self.inside = False

    def handle_data(self, data: str) -> None:
        if getattr(self, "inside", False):
            self.trained[-1] += data


def test_page(prepared: PreparedStage, toy: Any, tmp_path: Path) -> None:
    write_page(prepared, toy, tmp_path / "page.html", title="stage <1>")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = _Page()
    page.feed(text)
    assert page.open == [] and page.trained[1] == "\u00e9 & \U0001f600<|end|><|endoftext|>" and len(page.trained) == 3
    assert "<b>3</b>" not in text and "stage &lt;1&gt;" in text and "http" not in text
