"""The preview's page in a real browser: nothing complains, nothing sticks out of a phone, tokens have their colours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browser import look

from sft.data.look.page import write_page
from sft.data.prepare import PreparedStage
from sft.report.chart import chart_head
from sft.report.drawing import unique_ids
from sft.report.funnel_figures import chart_data

SEEN = """{
  viewport: page.innerWidth, content: root.scrollWidth,
  sheet: page.getComputedStyle(page.document.body).backgroundColor,
  colours: ['trained', 'context', 'boundary'].map(kind => {
    const style = page.getComputedStyle(page.document.querySelector('pre .' + kind));
    return style.backgroundColor + ' ' + style.color;
  }),
  cut: page.document.querySelectorAll('.layout .cut').length,
  shown: page.document.querySelector('details.document pre').getBoundingClientRect().height,
  columns: [...page.document.querySelectorAll('.funnel tr:first-child th')].filter(one => one.offsetParent).length,
  plots: [...page.document.querySelectorAll('.plot')].filter(one => one.offsetParent).length,
  figures: page.document.querySelectorAll('figure').length,
  folded: [...page.document.querySelectorAll('details.document:not([open])')].length,
  dangling: [...page.document.querySelectorAll('a[href]')].filter(
    a => !page.document.getElementById(a.getAttribute('href').slice(1))).length,
}"""


@pytest.fixture
def page(prepare: Callable[..., PreparedStage], write_rows: Callable[..., Path], toy: Any, tmp_path: Path) -> Path:
    long = "x" * 300  # a word that can't be broken
    rows = [
        {"id": f"{long}{n}", "p": f"What is {n}? {long}", "c": f"{n}</pre><script>throw 1</script>"} for n in range(8)
    ]
    rows += [{"id": "long", "p": "Say it.", "c": "word " * 1000}, {"id": "short", "p": "a", "c": "b"}]
    source = {"path": str(write_rows(rows)), "columns": {"prompt": "p", "completion": "c", "id": "id"}}
    prepared = prepare(
        [source],
        train={"max_length": 2500, "packing": True},
        over_length="truncate",
        steps=[{"length": {"min_tokens": 20}}],
    )
    drawn = chart_data(prepared.manifest)
    figures = {name: (unique_ids(svg, name), caption) for name, (svg, _, caption) in drawn.items()}
    write_page(prepared, toy, tmp_path / "page.html", title=long, figures=figures, head=chart_head())
    return tmp_path / "page.html"


@pytest.mark.parametrize("dark", [False, True])
def test_the_page_on_a_phone(page: Path, dark: bool) -> None:
    seen = look(page, SEEN, width=390, dark=dark)
    assert seen["console"] == []
    assert seen["viewport"] == 390 and seen["content"] <= 390
    assert len(set(seen["colours"])) == 3
    lightness = [int(part) for part in seen["sheet"].removeprefix("rgb(").rstrip(")").split(",")]
    assert max(lightness) < 60 if dark else min(lightness) > 200
    # No column of the funnel is hidden, and of each figure one layout is shown.
    assert seen["columns"] == 7 and seen["plots"] == seen["figures"] > 0
    # In the map, and above its tokens.
    assert seen["cut"] == 2 and seen["shown"] > 10 and seen["folded"] == 1 and seen["dangling"] == 0


def test_the_page_on_a_desk(page: Path) -> None:
    seen = look(page, SEEN, width=1280)
    assert seen["console"] == [] and seen["content"] <= 1280
    assert seen["columns"] == 7 and seen["plots"] == seen["figures"] > 0
