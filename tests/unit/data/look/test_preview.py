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

from sft.data.engine.accounts import funnel_lines
from sft.data.look.bar import CUT, FREE, SHADES, bar, cells
from sft.data.look.find import first_cut, rows_with
from sft.data.look.page import write_page
from sft.data.look.pieces import documents_of
from sft.data.look.preview import columns_told, show_lengths, show_numbers, show_rows
from sft.data.look.statistics import document_lengths, histogram, statistics
from sft.data.prepare import PreparedStage

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
    show_numbers(prepared, console)
    show_lengths(prepared, console)
    show_rows(prepared, tokenizer, range(len(prepared.dataset)), console, **keys)
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


def test_histogram_counts_every_length_once() -> None:
    lengths = np.array([0, 1, 9, 10, 10, 99, 100, 437])
    bins = histogram(lengths, 10)
    assert len(bins) <= 11 and bins[0][0] == 0 and bins[-1][0] <= 437 < bins[-1][1]
    assert [count for _, _, count in bins] == [((lengths >= a) & (lengths < b)).sum() for a, b, _ in bins]
    assert sum(count for _, _, count in bins) == len(lengths) and histogram(lengths[:0], 10) == []


@pytest.mark.parametrize(
    ("lengths", "room", "expected"),
    [([50, 50], 100, "0011"), ([25, 25], 100, "01.."), ([100], 0, "0000"), ([13, 62, 25], 100, "0112")],
)
def test_a_bar_has_each_document_where_it_lies(lengths: list[int], room: int, expected: str) -> None:
    shown = "".join("." if index is None else str(index) for index in cells(lengths, room, 4))
    assert shown == expected


def test_a_bar_tells_documents_and_cut_ones_apart_without_colour() -> None:
    text = bar([4, 3, 2], [False, True, False], 12, 12, colour=False).plain
    assert text.strip("\u2595\u258f") == SHADES[0] * 4 + SHADES[1] * 2 + CUT + SHADES[0] * 2 + FREE * 3


# ---- documents that were cut ----

LIMIT = 90


@pytest.fixture
def cut(prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path]) -> PreparedStage:
    """Documents of 40 to 140 tokens cut at 90, and one of exactly 90 that isn't."""

    def row(name: str, answer: int) -> dict[str, Any]:
        return {
            "id": name,
            "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * answer}],
        }

    rows = [row(f"n{answer}", answer) for answer in range(36, 140, 20)]
    # Beside the answer a document has six tokens: user, q, end, assistant, end, end of text.
    return prepare(
        write_rows([*rows, row("exact", LIMIT - 6), row("again", 120), row("again", 30)]),
        train={"max_length": LIMIT, "packing": True},
        over_length="truncate",
    )


def test_what_was_cut_is_known_by_its_whole_length(cut: PreparedStage, toy: Any) -> None:
    lengths = dict(first_cut(cut, 10))
    assert lengths == {"n96": 102, "n116": 122, "n136": 142, "again": 126}
    assert cut.manifest["funnel"]["truncated"] == len(lengths)
    shown = _shown(cut, toy, colour=False)
    assert "\u2702 cut at 90 tokens (tokens they had): n96 (102), n116 (122), n136 (142), again (126)" in shown
    assert re.findall(r"document \d+: (\S+): 90 tokens, \d+ trained, cut at max_length: it had (\d+)", shown)[:3] == [
        ("n96", "102"),
        ("n116", "122"),
        ("n136", "142"),
    ]
    assert "exact: 90 tokens, 86 trained\n" in shown and "\u2702 52 tokens are cut off here" in shown


def test_the_page_marks_what_was_cut(cut: PreparedStage, toy: Any, tmp_path: Path) -> None:
    write_page(cut, toy, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    anchor = re.search(r'<a href="#(row-\d+-\d+)">n136</a> <span class="soft">had 142', text)
    assert anchor and f'id="{anchor[1]}"' in text
    assert 'title="n136: 90 tokens, cut: it had 142" href' in text and 'title="exact: 90 tokens" href' in text
    assert '<span class="badge">cut: it had 122</span>' in text


def test_a_row_is_found_by_the_id_of_its_document(cut: PreparedStage, toy: Any) -> None:
    for number, row in enumerate(cut.dataset):
        for name in row["document_ids"]:
            assert number in rows_with(cut, name)
    assert len(rows_with(cut, "again")) == 2 and rows_with(cut, "n9") == []
    shown = _shown(cut, toy, colour=False, only="n56")
    assert "document 1: n56: 62 tokens" in shown or "document 2: n56: 62 tokens" in shown
    assert shown.count("-- document") == 1


# ---- what became of the rows ----


def test_a_stage_without_steps_has_a_funnel_with_examples(
    prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path], toy: Any, tmp_path: Path
) -> None:
    long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "<b>" * 100}]}
    rows: list[Any] = [*ROWS, long, long, "{broken", {"messages": []}]
    prepared = prepare(write_rows(rows), train={"max_length": 200}, max_bad_fraction=0.9)
    read, tokenized, last = funnel_lines(prepared.manifest)
    assert (read.rows_in, read.rows_out, dict(read.reasons)) == (6, 4, {"bad: broken_json": 1, "bad: no_messages": 1})
    assert (tokenized.rows_in, tokenized.rows_out) == (4, 4)
    assert (last.rows_in, last.rows_out, dict(last.reasons)) == (4, 2, {"over_length": 2})
    write_page(prepared, toy, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<code>rows.jsonl:3</code>" in text and "<code>rows.jsonl:5</code>" in text and "{broken" in text
    assert "<b>over_length</b> 2 dropped" in text


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


def test_columns_that_are_read_and_that_are_not_are_told(prepare: Any, write_rows: Any) -> None:
    row = {"question": "2+2?", "answer": "4", "note": "x", "system": "s"}
    carried = {"path": str(write_rows([row | {"kept": 1}])), "carry": ["kept"]}
    prepared = prepare([carried])
    (line,) = columns_told(prepared.manifest)
    assert line.endswith("rows.jsonl: prompt is question, completion is answer, system; not read: note")
    many = prepare(write_rows([row | {f"c{n:02}": n for n in range(20)}], "many.jsonl"))
    (line,) = columns_told(many.manifest)
    assert line.endswith("not read: c00, c01, c02, c03, c04, c05, c06, c07, c08, c09 and 11 more")
