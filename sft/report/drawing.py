"""What the figures share: style, panels, and how they become SVG and PNG; drawn without a display."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sft.report.chart import chart
from sft.report.readings import readings

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Each at least 3 to 1 on white, and on a dark page turned round.
START = "#7d838a"
COLORS = ("#4269d0", "#2f8f45", "#b97a00", "#d9482b", "#8f4fe0", "#2a8f80", "#8f5f43")
_narrow: ContextVar[bool] = ContextVar("narrow", default=False)
"""Whether panels stand below each other, as a phone shows them."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sft",
    "font.family": "sans-serif",
    "font.size": 10,
    # What users and data call things is shown as it is: `$` is no formula.
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#888",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.dpi": 110,
    "figure.constrained_layout.use": True,
}


@contextmanager
def drawing(*, narrow: bool = False) -> Iterator[None]:
    """The style, while figures are made and saved; `narrow`: for a phone."""
    import matplotlib

    before = _narrow.set(narrow)
    try:
        with matplotlib.rc_context(_STYLE):
            yield
    finally:
        _narrow.reset(before)


def is_narrow() -> bool:
    """Whether what is drawn now is for a phone."""
    return _narrow.get(False)


Drawn = tuple[str, bytes, str]
"""SVG or HTML, PNG, caption."""
Draw = Callable[[Any], "Figure | None"]


def as_picture(draw: Draw, source: Any, caption: str) -> Drawn | None:
    """What `draw` makes of `source` as SVG and PNG; None where it has nothing to show."""
    with drawing():
        figure = laid_out(draw(source))
        return None if figure is None else (as_svg(figure), as_png(figure), caption)


def as_chart(draw: Draw, source: Any, caption: str) -> Drawn | None:
    """What `draw` makes of `source` as HTML, for wide and narrow screens and with values to read off, and as PNG."""
    with drawing():
        figure = laid_out(draw(source))
        if figure is None:
            return None
        wide, png = (as_svg(figure), readings(figure)), as_png(figure)
    with drawing(narrow=True):
        slim = laid_out(draw(source))
        assert slim is not None
        narrow = unique_ids(as_svg(slim), "narrow"), readings(slim)
    return chart(caption, wide, narrow), png, caption


def all_drawn(
    figures: Mapping[str, tuple[Draw, str]], source: Any, make: Callable[[Draw, Any, str], Drawn | None]
) -> dict[str, Drawn]:
    """Of the figures (name -> how it is drawn, caption) those for which there is data."""
    made = {name: make(draw, source, caption) for name, (draw, caption) in figures.items()}
    return {name: figure for name, figure in made.items() if figure is not None}


def laid_out(figure: Figure | None) -> Figure | None:
    """The figure with its parts in their places: once for all files, each of which is drawn twice otherwise."""
    if figure is not None and (engine := figure.get_layout_engine()):
        engine.execute(figure)
        figure.set_layout_engine("none")
    return figure


def as_svg(figure: Figure) -> str:
    """The figure as an SVG element, without background: the page's shows."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """The figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def unique_ids(svg: str, name: str) -> str:
    """The SVG with its ids made unique in the page: matplotlib names clip paths and markers alike in every figure."""
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg)


def panels(count: int, *, height: float = 3.0) -> tuple[Any, list[Any]]:
    """A figure with `count` panels beside and below each other; they share the vertical scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 1 if is_narrow() else count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    figure = Figure(figsize=(4.4, (0.8 if rows > 1 else 1.0) * height * rows) if is_narrow() else (9.2, height * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, list(axes[:count])


def legend(figure: Any, axis: Any) -> None:
    """The legend of all panels, above them."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        columns = min(len(labels), 3 if is_narrow() else 8)
        figure.legend(handles, labels, loc="outside upper right", ncols=columns, fontsize=9)


def log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each power of ten, in plain digits."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
