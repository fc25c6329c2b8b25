"""The report as a browser lays it out: nothing sticks out, every column and figure is whole, values can be read off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import look
from report_toys import STAGES, make_recipe, write_stage, write_suite

from sft.recipe import RunPaths
from sft.report import write_report

SEEN = """(() => {
  const all = (query) => [...page.document.querySelectorAll(query)].filter(one => one.getClientRects().length);
  const box = (one) => one.getBoundingClientRect();
  const outside = (one) => box(one).left < -0.5 || box(one).right > root.clientWidth + 0.5;
  const text = (one) => one.textContent.slice(0, 60);
  const parse = (color) => color.match(/[\\d.]+/g).map(Number);
  const linear = (part) => part <= 10 ? part / 3294.6 : ((part / 255 + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
  const sheet = (one) => {
    const color = parse(page.getComputedStyle(one).backgroundColor);
    return color.length < 4 || color[3] === 1 ? color : sheet(one.parentElement);
  };
  const contrast = (one) => {
    const [more, less] = [light(parse(page.getComputedStyle(one).color)), light(sheet(one))].sort((a, b) => b - a);
    return (more + 0.05) / (less + 0.05);
  };
  const speaks = (one) => [...one.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
  const cells = all('table.cards td, table.cards tbody th');
  page.document.querySelectorAll('details.values').forEach(one => { one.open = true; });
  return {
    content: root.scrollWidth, cells: cells.length, hidden: cells.filter(outside).map(text),
    clipped: all('.wide').filter(one => one.scrollWidth > one.clientWidth + 1).map(text),
    columns: all('table.cards td').map(one => one.dataset.column),
    drawings: all('figure svg').length, cut: all('figure svg, figure svg text').filter(outside).map(text),
    small: Math.min(...all('figure svg text').map(one => box(one).height)),
    faint: all('body *:not(svg *, script, style)').filter(one => speaks(one) && contrast(one) < 4.5).map(text),
    headings: all('h1, h2, h3').map(one => +one.tagName[1]),
    unnamed: all('[tabindex]').filter(one => !one.getAttribute('aria-label')).length,
  };
})()"""
READ = """(() => {
  const plot = [...page.document.querySelectorAll('.plot')].find(one => one.offsetParent);
  const tip = () => plot.querySelector('.tip').innerText, box = plot.getBoundingClientRect();
  const point = (kind, type, x) => plot.dispatchEvent(new page.PointerEvent(kind, {bubbles: true, pointerType: type,
    clientX: box.left + x * box.width, clientY: box.top + box.height / 4}));
  const key = (name) => plot.dispatchEvent(new page.KeyboardEvent('keydown', {key: name, cancelable: true}));
  const seen = {before: tip()};
  point('pointermove', 'mouse', 0.95); seen.hover = tip();
  const shown = plot.querySelector('.tip').getBoundingClientRect();
  seen.whole = shown.left >= 0 && shown.right <= page.innerWidth;
  point('pointerleave', 'mouse', 0.5); seen.left = tip();
  point('pointerdown', 'touch', 0.95); point('pointerleave', 'touch', 0.95); seen.touch = tip();
  key('Escape'); seen.escaped = tip();
  key('ArrowRight'); seen.first = tip(); key('End'); seen.end = tip(); key('ArrowLeft'); seen.back = tip();
  seen.marks = plot.querySelectorAll('.dot').length;
  return seen;
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three stages, with two suites, and a name that can't be broken."""
    recipe = make_recipe(tmp_path_factory.mktemp("layout") / "run")
    paths = RunPaths(recipe)
    for point in ("start", *STAGES):
        write_suite(paths, point)
        write_suite(paths, point, "olympiad-problems-of-twenty-years")
    for name in STAGES:
        write_stage(paths, name)
    return write_report(recipe, paths)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_column_is_seen_and_every_figure_whole(page: Path, width: int, dark: bool) -> None:
    seen = look(page, SEEN, width=width, dark=dark)
    assert seen["console"] == [] and seen["content"] <= width
    assert seen["hidden"] == [] and seen["clipped"] == [] and seen["cells"] > 100
    assert {"start", "after broad", "after hard", "after long", "total gain", "tokens/s", "what is trained"} <= set(
        seen["columns"]
    )
    # One of the two layouts of each figure is there, with nothing beyond its edges, and letters that can be read.
    assert seen["drawings"] == 5 and seen["cut"] == [] and seen["small"] > 9
    assert seen["faint"] == [] and seen["unnamed"] == 0
    assert seen["headings"][0] == 1 and all(
        b - a <= 1 for a, b in zip(seen["headings"], seen["headings"][1:], strict=False)
    )


@pytest.mark.parametrize("width", [390, 1280])
def test_values_are_read_by_pointer_finger_and_keys(page: Path, width: int) -> None:
    seen: dict[str, Any] = look(page, READ, width=width)
    assert seen["console"] == [] and seen["before"] == seen["left"] == seen["escaped"] == ""
    assert seen["hover"] == seen["touch"] and "long" in seen["hover"].splitlines()[0] and seen["whole"]
    assert "all" in seen["hover"] and "%" not in seen["first"] and "start" in seen["first"].splitlines()[0]
    assert "long" in seen["end"].splitlines()[0] and "hard" in seen["back"].splitlines()[0] and seen["marks"] > 1
