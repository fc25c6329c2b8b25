"""The figure of `sft bench`: times by length where lengths were measured, else tokens per second by workload."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sft.generate.bench.rows import Row
from sft.report.drawing import COLORS, legend, log_ticks, panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_bench(rows: Sequence[Row]) -> Figure:
    """A line for each side; what had no memory is left out."""
    curves = [row for row in rows if row.length is not None]
    return _draw_curves(curves) if curves else _draw_answers(rows)


def _draw_answers(rows: Sequence[Row]) -> Figure:
    figure, (axis,) = panels(1)
    works, sides = list(dict.fromkeys(row.what for row in rows)), _sides(rows)
    width = 0.8 / len(sides)
    for place, side in enumerate(sides):
        mine = [row for row in rows if row.side == side and row.tokens_per_second]
        left = [works.index(row.what) + width * (place - (len(sides) - 1) / 2) for row in mine]
        axis.bar(left, [row.tokens_per_second for row in mine], 0.9 * width, color=COLORS[place], label=side)
    axis.set_xticks(range(len(works)), works, rotation=15 if len(works) > 2 else 0)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("tokens per second")
    legend(figure, axis)
    return figure


def _draw_curves(rows: Sequence[Row]) -> Figure:
    """A panel for each number of requests, and one of prompts where several lengths were read."""
    counts = list(dict.fromkeys(row.requests for row in rows))
    first = [row for row in rows if row.first_token is not None and row.requests == counts[0]]
    read = len({row.length for row in first}) > 1
    figure, axes = panels(len(counts) + read)
    for axis, count in zip(axes, counts, strict=False):
        for side in _sides(rows):
            mine = [row for row in rows if (row.side, row.requests) == (side, count) and row.token]
            _line(axis, rows, side, [row.length for row in mine], [1e3 * (row.token or 0) for row in mine])
        axis.set_title(f"a token, {count} at once")
    if read:
        for side in _sides(first):
            mine = [row for row in first if row.side == side]
            _line(axes[-1], rows, side, [row.length for row in mine], [1e3 * (row.first_token or 0) for row in mine])
        axes[-1].set_title("a prompt's first token")
    for axis in axes:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        log_ticks(axis.yaxis)
        axis.set_xlabel("tokens")
    axes[0].set_ylabel("milliseconds")
    legend(figure, axes[0])
    return figure


def _sides(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.side for row in rows))


def _line(axis: Any, rows: Sequence[Row], side: str, x: Sequence[Any], y: Sequence[Any]) -> None:
    axis.plot(x, y, "o-", ms=4, color=COLORS[_sides(rows).index(side) % len(COLORS)], label=side)
