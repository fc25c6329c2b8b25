"""The funnel's lines, and what the entries count: against the rows that the steps wrote."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from sft.data.engine import builder
from sft.data.engine.accounts import funnel_lines
from sft.data.engine.shards import length_bin
from sft.data.prepare import PreparedStage
from sft.report.funnel_figures import _next_edge, draw_data


@pytest.fixture
def prepared(
    prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> PreparedStage:
    """Two sources, one with rollouts, in several shards; some rows end in each step and some at max_length."""
    monkeypatch.setattr(builder, "SHARD_ROWS", 7)
    plain: list[Any] = [{"q": f"What is {n}?", "a": f"{n}. " * (1 + n % 40)} for n in range(60)]
    rolled = [
        {"q": f"Add {n}.", "r": ["so " * k for k in range(1, 5)], "ok": [k % 4 < n % 5 for k in range(4)]}
        for n in range(20)
    ]
    sources = [
        {"path": str(write_rows([*plain, "{broken"], "plain.jsonl")), "columns": {"prompt": "q", "completion": "a"}},
        {
            "path": str(write_rows(rolled, "rolled.jsonl")), "columns": {"prompt": "q"}, "rows": "problems",
            "carry": ["r", "ok"], "steps": [{"explode_rollouts": {"column": "r", "flags": {"ok": "ok"}}}],
        },
    ]  # fmt: skip
    steps = [{"length": {"min_tokens": 20}}, {"select": {"rows": 70}}]
    return prepare(sources, steps=steps, max_bad_fraction=0.2, train={"max_length": 90, "packing": True})


def test_entries_count_what_the_passes_wrote(prepared: PreparedStage) -> None:
    """The last step of a pass kept what is in the pass's files."""
    entries = {entry["title"]: entry for entry in prepared.manifest["steps"]}
    for folder in prepared.passes[:-1]:
        rows = [row for path in sorted(folder.glob("kept-*.parquet")) for row in pq.read_table(path).to_pylist()]
        account = json.loads((folder / "manifest.json").read_text())["accounts"][-1]
        assert account["kept"]["rows"] == len(rows)
        sources: dict[str, Counter[str]] = {}
        for row in rows:
            sources.setdefault(row["source"], Counter()).update(rows=1, tokens=row["tokens"] or 0)
        assert account["sources"] == sources
        lengths = Counter(length_bin(row["tokens"]) for row in rows if row["tokens"] is not None)
        assert account["lengths"] == {str(edge): count for edge, count in lengths.items()}
        rates = Counter(json.loads(row["facts"]).get("explode_rollouts", {}).get("pass_rate") for row in rows)
        del rates[None]
        # The fixture's rates are quarters: 0.25 is in the bin that begins at 0.2, 0.75 in that of 0.7.
        assert account["pass_rates"] == {str(int(rate * 10) / 10): count for rate, count in rates.items()}
    assert set(entries["select"]["sources"]) == {"plain", "rolled"}
    assert set(entries["select"]["pass_rates"]) >= {"0.0", "0.2", "0.5", "0.7", "1.0"}


def test_entries_name_what_they_read(prepared: PreparedStage) -> None:
    entries = prepared.manifest["steps"]
    by_key = {entry["key"]: entry for entry in entries}
    for entry in entries:
        given = sum(by_key[key]["kept"]["rows"] for key in entry["inputs"])
        assert entry["step"] == "read" if not entry["inputs"] else given == entry["taken"]["rows"], entry["title"]


def test_lines_lead_from_the_sources_to_the_rows_trained_on(prepared: PreparedStage) -> None:
    lines = funnel_lines(prepared.manifest)
    assert [line.title for line in lines] == [
        "plain: read", "rolled: read", "rolled: explode_rollouts", "tokenize", "length", "select", "rows to train on",
    ]  # fmt: skip
    for line in lines:
        made = 60 if line.step == "explode_rollouts" else 0
        assert line.rows_in + made == line.rows_out + line.dropped, line.title
    assert lines[0].reasons == [("bad: broken_json", 1)]
    assert lines[-1].rows_in == lines[-2].rows_out and lines[-1].rows_out == prepared.manifest["documents"]
    assert dict(lines[-1].reasons)["over_length"] > 0 and lines[-1].tokens_in == lines[-2].tokens_out


def test_figures_are_drawn_of_what_there_is(prepared: PreparedStage) -> None:
    drawn = draw_data(prepared.manifest)
    assert set(drawn) == {"funnel", "lengths", "sources", "difficulty"}
    for svg, png, caption in drawn.values():
        assert svg.startswith("<svg") and png.startswith(b"\x89PNG") and caption.endswith(".")
    for name, counts in prepared.manifest["steps"][-1]["sources"].items():
        assert name in drawn["sources"][0] and f"{counts['rows']:,} (" in drawn["sources"][0]
    for text in ("over_length", "too_short", "goes on", "explode_rollouts"):
        assert text in drawn["funnel"][0], text
    assert draw_data({"funnel": {}}) == {}


def test_a_bin_ends_where_the_next_begins() -> None:
    edges = sorted({length_bin(tokens) for tokens in range(5000)})
    assert [_next_edge(edge) for edge in edges[:-1]] == edges[1:]
