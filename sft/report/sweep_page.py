"""A sweep as one HTML page: its best setting, a figure and a table of all points, and the best one's recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.grid import shown
from sft.recipe.load import resolved_yaml
from sft.recipe.published import published_recipe, secrets_of
from sft.report.chart import chart_head
from sft.report.drawing import COLORS, as_chart, legend, panels, unique_ids
from sft.report.figures import errorbar, percent_axis
from sft.report.page import templates
from sft.report.sweep import Setting, Sweep, table
from sft.utils.files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CAPTION = (
    "pass@1 after the last stage with 95% intervals. Points that differ by seed alone are averaged, "
    "and each run is a small dot."
)
LOSS_CAPTION = "Loss of the held-out rows after the last stage; points that differ by seed alone are averaged."


def write_sweep_page(sweep: Sweep) -> Path:
    """Write `sweep.html` into the sweep's folder; its path."""
    first = sweep.grid.points[0].recipe
    drawn = as_chart(draw_sweep, sweep, CAPTION if sweep.suites else LOSS_CAPTION)
    secrets = secrets_of(first.model_dump(), first.given.text, first.given.overrides)
    head, rows = table(sweep)
    best = sweep.best_point
    content = {
        "title": f"{first.report.title or first.name}: a sweep of {', '.join(axis.label for axis in sweep.grid.axes)}",
        "sweep": sweep,
        "verdict": verdict(sweep),
        "head": head,
        "rows": rows,
        "texts": [axis.label for axis in sweep.grid.axes],
        "figure": None if drawn is None else (unique_ids(drawn[0], "sweep"), drawn[2]),
        "chart_head": chart_head() if drawn else "",
        "failed": [(outcome.point.name, outcome.error) for outcome in sweep.outcomes if outcome.error],
        "recipe_text": published_recipe(resolved_yaml(best.recipe), secrets) if best else "",
    }
    page = sweep.grid.root / "sweep.html"
    write_text(page, templates(True, secrets).get_template("sweep.html.j2").render(content))
    return page


def verdict(sweep: Sweep) -> str:
    """The best setting in a sentence."""
    best = sweep.best
    if best is None or best.score is None:
        return "No setting has all its numbers, so none is the best."
    named = _called(best) or "this recipe"
    number = f"{best.score:.4f}" if sweep.metric.suite is None else f"{best.score:.1%}"
    runs = f", the mean of {len(best.outcomes)} runs" if len(best.outcomes) > 1 else ""
    return f"Best by {sweep.metric}: {named} with {number}{runs}."


def _called(setting: Setting) -> str:
    return ", ".join(f"{label} {shown(value)}" for label, value in setting.values.items())


def draw_sweep(sweep: Sweep) -> Figure | None:
    """A panel for each suite (or the held-out loss): the first axis across, a line for each setting of the others."""
    suites: list[str | None] = [*sweep.suites] or [None]
    if suites == [None] and not any(setting.loss is not None for setting in sweep.settings):
        return None
    figure, axes = panels(len(suites))
    across = next((axis for axis in sweep.grid.axes if not axis.is_seed), None)
    for panel, suite in zip(axes, suites, strict=True):
        lines = _lines(sweep, across.label if across else None)
        for number, (name, settings) in enumerate(lines.items()):
            _draw_line(panel, settings, suite, COLORS[number % len(COLORS)], name or None)
        if across is not None:
            panel.set_xticks(range(len(across.values)), [shown(value) for value in across.values])
            panel.set_xlabel(across.label)
        else:
            panel.set_xticks([0], ["all seeds"])
        panel.margins(x=0.15)
        if suite is not None:
            percent_axis(panel)
        panel.set_title(suite or "held-out rows")
    axes[0].set_ylabel("pass@1, %" if sweep.suites else "loss per supervised token")
    if len(lines) > 1:
        legend(figure, axes[0])
    return figure


def _lines(sweep: Sweep, across: str | None) -> dict[str, list[tuple[int, Setting]]]:
    """Lines by what their settings have in common, each setting with its place across."""
    places = {
        shown(value): i for axis in sweep.grid.axes if axis.label == across for i, value in enumerate(axis.values)
    }
    lines: dict[str, list[tuple[int, Setting]]] = {}
    for setting in sweep.settings:
        others = {label: value for label, value in setting.values.items() if label != across}
        name = ", ".join(f"{label} {shown(value)}" for label, value in others.items())
        lines.setdefault(name, []).append((places[shown(setting.values[across])] if across else 0, setting))
    return lines


def _draw_line(
    panel: Any, settings: list[tuple[int, Setting]], suite: str | None, color: str, name: str | None
) -> None:
    if suite is None:
        known = [(place, setting.loss) for place, setting in settings if setting.loss is not None]
        if known:
            panel.plot(*zip(*known, strict=True), "o-", color=color, label=name or "loss")
        return
    found = [(place, estimate) for place, setting in settings if (estimate := setting.estimate(suite))]
    entries = [{"pass_at_1": e.value, "interval": (e.low, e.high)} for _, e in found]
    if entries:
        errorbar(panel, [place for place, _ in found], entries, color=color, label=name)
    for place, setting in settings:
        runs = [100 * outcome.suites[suite]["pass_at_1"] for outcome in setting.outcomes if suite in outcome.suites]
        if len(runs) > 1:
            panel.plot([place] * len(runs), runs, "o", color=color, ms=2.5, alpha=0.5, label="_runs")
