"""A figure on a page: SVG for wide and for narrow screens, values to read off by pointer, touch or keys, a table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from markupsafe import Markup, escape

from sft.report.readings import Panel, table_of

_FOLDER = Path(__file__).with_name("templates")
_Layout = tuple[str, Sequence[Panel]]


def chart(caption: str, wide: _Layout, narrow: _Layout) -> str:
    """The HTML of a figure. Both layouts are there, and the page's style shows one of them."""
    label = f"{caption} Arrow keys read the values; they are in the table below, too."
    plots = "".join(_plot(kind, label, *layout) for kind, layout in (("wide", wide), ("narrow", narrow)))
    return f'<div class="chart">{plots}</div>{_tables(wide[1])}'


def _plot(kind: str, label: str, svg: str, panels: Sequence[Panel]) -> str:
    if not panels:
        return f'<div class="plot {kind}">{_image(svg, label.split(" Arrow keys")[0])}</div>'
    values = [
        {
            "title": panel.title,
            "box": panel.box,
            "series": [
                {
                    "label": series.label,
                    "color": series.color,
                    "points": [[point.x, point.y, point.where, point.value] for point in series.points],
                }
                for series in panel.series
            ],
        }
        for panel in panels
    ]
    # No text of a run may end the element that it stands in.
    data = json.dumps(values, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return (
        f'<div class="plot {kind}" tabindex="0" role="group" aria-label="{escape(label)}">{_image(svg, None)}'
        f'<script type="application/json">{data}</script></div>'
    )


def _image(svg: str, label: str | None) -> str:
    """The SVG for those who can't see it: as one image, or as nothing where the element around it is named."""
    told = 'aria-hidden="true"' if label is None else f'role="img" aria-label="{escape(label)}"'
    return svg.replace("<svg ", f"<svg {told} ", 1)


def _tables(panels: Sequence[Panel]) -> str:
    if not panels:
        return ""
    tables = []
    for panel in panels:
        head, rows = table_of(panel)
        cells = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
        lines = "".join(
            f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row)}</tr>'
            for name, *row in rows
        )
        tables.append(
            f'<div class="wide" tabindex="0" role="region" aria-label="{escape(panel.title)}"><table class="values">'
            f"<caption>{escape(panel.title)}</caption><tr>{cells}</tr>{lines}</table></div>"
        )
    return f'<details class="values"><summary>Values</summary>{"".join(tables)}</details>'


@cache
def chart_head() -> Markup:
    """The style and the script that a page with charts holds once."""
    style, script = ((_FOLDER / f"chart.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return Markup(f"<style>\n{style}</style>\n<script>\n{script}</script>")
