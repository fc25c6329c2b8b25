"""Figures of a stage's data steps, from the entries of its funnel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sft.data.engine.accounts import FunnelLine, funnel_lines, has_steps
from sft.data.steps import FIT, TOKENIZE
from sft.report.drawing import (
    COLORS,
    START,
    Drawn,
    all_drawn,
    as_chart,
    as_picture,
    is_narrow,
    legend,
    log_ticks,
    panels,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = COLORS[0]
BEFORE = "#a4abb3"
_REASONS = (COLORS[3], COLORS[2], COLORS[4], COLORS[1], COLORS[6], COLORS[5])
_OTHER = START
_BAR_HEIGHT = 0.32  # inches
_NAME, _SLIM_NAME, _TITLE = 28, 15, 24  # characters of a name beside a bar (on a phone), and of one over a panel

Entries = list[dict[str, Any]]


def draw_data(manifest: dict[str, Any]) -> dict[str, Drawn]:
    """Name -> (SVG text, PNG bytes, caption) of every figure of a prepared stage; none where it has no data steps."""
    return all_drawn(FIGURES, manifest, as_picture) if has_steps(manifest) else {}


def chart_data(manifest: dict[str, Any]) -> dict[str, Drawn]:
    """The same for a page: (HTML, PNG bytes, caption)."""
    return all_drawn(FIGURES, manifest, as_chart) if has_steps(manifest) else {}


def draw_funnel(manifest: dict[str, Any]) -> Figure | None:
    """A bar for each step: rows that go on, and beside them those that end there, by reason."""
    # Steps that let all rows through unchanged say nothing here.
    lines = [line for line in funnel_lines(manifest) if line.step != TOKENIZE or line.dropped]
    total = sum((Counter(dict(line.reasons)) for line in lines), Counter[str]())
    named = [reason for reason, _ in total.most_common(len(_REASONS))]
    colors = dict(zip(named, _REASONS, strict=False))
    figure, (axis,) = panels(1, height=0.9 + _BAR_HEIGHT * len(lines))
    widest = max(line.rows_out + line.dropped for line in lines)
    for place, line in enumerate(lines):
        _funnel_bar(axis, place, line, colors, widest)
    handles = {"goes on": KEPT, **colors, **({"other reasons": _OTHER} if len(total) > len(named) else {})}
    for label, color in handles.items():
        axis.barh(0, 0, color=color, label=label)
    _names(axis, [line.title for line in lines])
    axis.set_xlim(0, 1.16 * widest)
    axis.set_xlabel("rows")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    legend(figure, axis)
    return figure


def _funnel_bar(axis: Any, place: int, line: FunnelLine, colors: dict[str, str], widest: int) -> None:
    axis.barh(place, line.rows_out, color=KEPT, height=0.72)
    left = line.rows_out
    for reason, count in line.reasons:
        axis.barh(place, count, left=left, color=colors.get(reason, _OTHER), height=0.72)
        left += count
    axis.text(left + 0.008 * widest, place, f"{line.rows_out:,}", va="center", fontsize=9)


def draw_lengths(manifest: dict[str, Any]) -> Figure | None:
    """Histograms of lengths, a panel for each step that changed which rows there are: before it, and after it."""
    entries: Entries = manifest["steps"]
    by_key = {entry["key"]: entry for entry in entries}
    pairs = [(entry, before) for entry in entries if (before := _lengths_before(entry, by_key)) is not None]
    if not pairs:
        return None
    figure, axes = panels(len(pairs), height=2.2)
    edges = [int(edge) for _, before in pairs for edge in before]
    for axis, (entry, before) in zip(axes, pairs, strict=True):
        _length_bars(axis, before, BEFORE, "before the step")
        _length_bars(axis, Counter(entry["lengths"]), KEPT, "after it")
        axis.set_xscale("log")
        axis.set_xlim(max(min(edges), 1) / 1.1, 1.1 * _next_edge(max(edges)))
        log_ticks(axis.xaxis)
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_title(_shortened(entry["title"], _TITLE))
        axis.yaxis.set_major_formatter("{x:,.0f}")
    figure.supxlabel("tokens of a row", fontsize=10)
    axes[0].set_ylabel("rows")
    legend(figure, axes[0])
    return figure


def _lengths_before(entry: dict[str, Any], by_key: dict[str, dict[str, Any]]) -> Counter[str] | None:
    """The lengths of the rows that a step took; None where it changed nothing, or nobody had measured them."""
    before: Counter[str] = Counter()
    for key in entry["inputs"]:
        before.update(by_key[key]["lengths"])
    return before if before and before != Counter(entry["lengths"]) else None


def _length_bars(axis: Any, lengths: Counter[str], color: str, label: str) -> None:
    edges = sorted(map(int, lengths))
    widths = [_next_edge(edge) - edge for edge in edges]
    heights = [lengths[str(edge)] for edge in edges]
    axis.bar(edges, heights, width=widths, align="edge", color=color, label=label, edgecolor="white", linewidth=0.4)


def _next_edge(edge: int) -> int:
    """Upper edge of the bin of a length (`shard.length_bin`: powers of two, each cut in two halves)."""
    if edge < 2:
        return edge + 1
    power = 1 << (edge.bit_length() - 1)
    return 2 * power if edge > power else edge + max(power // 2, 1)


def draw_sources(manifest: dict[str, Any]) -> Figure | None:
    """Rows and tokens that each source gives after the last step."""
    given: dict[str, Counter[str]] = {}
    for entry in (entry for entry in manifest["steps"] if entry["step"] == FIT):
        for name, counts in entry["sources"].items():
            given.setdefault(name, Counter()).update(counts)
    if not given:
        return None
    names = sorted(given, key=lambda name: (-given[name]["tokens"], name))
    figure, axes = panels(2, height=0.9 + _BAR_HEIGHT * len(names))
    for axis, kind in zip(axes, ("rows", "tokens"), strict=True):
        values = [given[name][kind] for name in names]
        axis.barh(range(len(names)), values, color=KEPT, height=0.72)
        for place, value in enumerate(values):
            label = f"{value:,} ({100 * value / max(sum(values), 1):.0f}%)"
            axis.text(value + 0.02 * max(values), place, label, va="center", fontsize=9)
        axis.set_title(kind)
        axis.set_xlim(0, 1.5 * max(*values, 1))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.xaxis.get_major_locator().set_params(nbins=4)
        axis.grid(axis="y", visible=False)
    _names(axes[0], names)
    return figure


def draw_difficulty(manifest: dict[str, Any]) -> Figure | None:
    """Rows by the pass rate of their problem, a panel for each step that changed it."""
    shown: Entries = []
    for entry in manifest["steps"]:
        if entry["pass_rates"] and (not shown or entry["pass_rates"] != shown[-1]["pass_rates"]):
            shown.append(entry)
    if not shown:
        return None
    figure, axes = panels(len(shown), height=2.2)
    for axis, entry in zip(axes, shown, strict=True):
        edges = [float(edge) for edge in entry["pass_rates"]]
        axis.bar([edge + 0.05 for edge in edges], entry["pass_rates"].values(), width=0.092, color=KEPT)
        axis.set_xlim(-0.02, 1.12)
        axis.set_xticks([0.0, 0.25, 0.5, 0.75, 1.05], ["0", "25%", "50%", "75%", "all"])
        axis.set_title(_shortened(entry["title"], _TITLE))
        axis.set_xlabel("right answers to the problem")
    axes[0].set_ylabel("rows")
    return figure


def _names(axis: Any, names: list[str]) -> None:
    """Names beside horizontal bars, the first at the top."""
    axis.set_yticks(range(len(names)), [_shortened(name, _SLIM_NAME if is_narrow() else _NAME) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def _shortened(name: str, limit: int) -> str:
    return name if len(name) <= limit else f"{name[: limit // 2 - 1]}\u2026{name[-limit // 2 :]}"


FIGURES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "funnel": (draw_funnel, "Rows through the steps: those that go on, and those that end there, by reason."),
    "lengths": (draw_lengths, "Lengths of the rows before and after each step that changed them."),
    "sources": (draw_sources, "What each source gives after the last step."),
    "difficulty": (
        draw_difficulty,
        "Rows by the share of right answers to their problem, after each step that changed which rows there are.",
    ),
}
