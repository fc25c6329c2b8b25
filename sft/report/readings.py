"""The values that a figure shows, with their places in it: for reading them off, and as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 240
"""Points of a line that can be read off: a pointer can't hit more."""
MARK = "mark"
"""What a line is called (`set_gid`) whose points are events: they have a place on the x axis and no value."""


@dataclass(frozen=True)
class Reading:
    """One point: its place as shares of the figure's width and height from the upper left, and what it says."""

    x: float
    y: float
    where: str
    value: str


@dataclass(frozen=True)
class Series:
    """The points of a line, or of bars."""

    label: str
    color: str
    points: list[Reading]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its box (left, top, right, bottom) as shares of the figure."""

    title: str
    box: tuple[float, float, float, float]
    series: list[Series]


def readings(figure: Figure) -> list[Panel]:
    """Every panel of a figure that has been drawn, with what can be read off it."""
    return [panel for axis in figure.axes if axis.get_visible() and (panel := _panel(axis)).series]


def _panel(axis: Any) -> Panel:
    box = axis.get_position()
    title = axis.get_title(loc="left") or axis.get_ylabel()
    left, top, right, bottom = (round(float(edge), 4) for edge in (box.x0, 1 - box.y1, box.x1, 1 - box.y0))
    return Panel(title, (left, top, right, bottom), list(_series(axis)))


def _series(axis: Any) -> Iterator[Series]:
    in_containers = set()
    for container in axis.containers:
        if hasattr(container, "has_yerr"):
            in_containers.add(container.lines[0])
            yield from _line(axis, container.lines[0], container.get_label(), _ends(container))
        elif getattr(container, "orientation", None) == "vertical":
            yield from _bars(axis, container)
    for line in axis.lines:
        told = line not in in_containers and not line.get_label().startswith("_")
        if told and line.get_transform() == axis.transData:  # a line across the panel has no values
            yield from _line(axis, line, line.get_label(), None)


def _ends(container: Any) -> list[Any]:
    """The lower and upper end of each point's interval."""
    return [[segment[0][1], segment[1][1]] for segment in container.lines[2][0].get_segments()]


def _line(axis: Any, line: Any, label: str, ends: Sequence[Any] | None) -> Iterator[Series]:
    from matplotlib.colors import to_hex

    xs, ys = list(line.get_xdata()), list(line.get_ydata())
    chosen = thinned(range(len(xs)), _MOST)
    event = line.get_gid() == MARK
    points = []
    for place in chosen:
        value = "" if event else _number(ys[place])
        if ends is not None:
            value += f" ({_number(ends[place][0])} to {_number(ends[place][1])})"
        points.append(_reading(axis, xs[place], ys[place], value))
    if points:
        name = label if label and not label.startswith("_") else axis.get_ylabel() or "value"
        yield Series(name, to_hex(line.get_color()), points)


def _bars(axis: Any, container: Any) -> Iterator[Series]:
    from matplotlib.colors import to_hex

    points = []
    for bar in container:
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        digits = ",.0f" if right - left >= 1 else ".3g"
        where = f"{left:{digits}} to {right:{digits}}"
        top = bar.get_y() + bar.get_height()
        if bar.get_height():
            points.append(_reading(axis, (left + right) / 2, top, f"{bar.get_height():,.0f}", where))
    if points:
        names = (str(found.get_label()) for found in (container, container[0]))
        name = next((name for name in names if not name.startswith("_")), axis.get_ylabel() or "number")
        yield Series(name, to_hex(container[0].get_facecolor()), points)


def _reading(axis: Any, x: float, y: float, value: str, where: str | None = None) -> Reading:
    figure = axis.figure
    across, up = axis.transData.transform((x, y))
    width, height = figure.bbox.width, figure.bbox.height
    return Reading(round(float(across / width), 4), round(float(1 - up / height), 4), where or _where(axis, x), value)


def _where(axis: Any, x: float) -> str:
    """A place on the x axis in words: the tick's, where words were set for ticks, else the number."""
    from matplotlib.ticker import FixedLocator

    if isinstance(axis.xaxis.get_major_locator(), FixedLocator):
        words = {place: text.get_text() for place, text in zip(axis.get_xticks(), axis.get_xticklabels(), strict=True)}
        if x in words:
            return words[x]
    name = axis.get_xlabel()
    return f"{name}{':' if ' ' in name else ''} {_number(x)}".strip()


def _number(value: float) -> str:
    value = float(value)
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"


def thinned(values: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the values, evenly spread, the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[round(place * (len(values) - 1) / (most - 1))] for place in range(most)]


def table_of(panel: Panel, most: int = 12) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a panel's values: a row for each place on the x axis, at most so many."""
    by_place: dict[str, dict[str, str]] = {}
    order: dict[str, float] = {}
    for series in panel.series:
        for point in series.points:
            order.setdefault(point.where, point.x)
            by_place.setdefault(point.where, {})[series.label] = point.value or "\u2713"
    labels = [series.label for series in panel.series]
    places = thinned(sorted(by_place, key=lambda where: order[where]), most)
    return ["", *labels], [[where, *(by_place[where].get(label, "\u2013") for label in labels)] for where in places]
