"""The report's figures, drawn without a display."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sft.evaluate.run import read_samples
from sft.report.collect import RunFacts

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_START = "#9aa0a6"
_COLORS = ("#4269d0", "#3ca951", "#efb118", "#ff725c", "#a463f2", "#6cc5b0", "#9c6b4e")
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sft",
    "font.family": "sans-serif",
    "font.size": 10,
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
def _drawing() -> Iterator[None]:
    import matplotlib

    with matplotlib.rc_context(_STYLE):
        yield


def draw_all(run: RunFacts) -> dict[str, tuple[str, bytes, str]]:
    """Name -> (SVG text, PNG bytes, caption) of every figure for which there is data."""
    drawn = {}
    for name, (draw, caption) in FIGURES.items():
        with _drawing():
            figure = draw(run)
            if figure is not None:
                drawn[name] = (_svg(figure), _png(figure), caption)
    return drawn


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _panels(count: int, *, height: float = 3.0) -> tuple[Any, list[Any]]:
    """A figure with `count` panels beside and below each other; they share the vertical scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = count if count <= 3 else 2 if count == 4 else 3
    rows = -(-count // columns)
    figure = Figure(figsize=(9.2, height * rows))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for unused in axes[count:]:
        unused.set_visible(False)
    return figure, list(axes[:count])


def _legend(figure: Any, axis: Any) -> None:
    """The legend of all panels, above them."""
    handles, labels = axis.get_legend_handles_labels()
    if labels:
        figure.legend(handles, labels, loc="outside upper right", ncols=min(len(labels), 8), fontsize=9)


def _log_ticks(axis: Any) -> None:
    """Ticks at 1, 2 and 5 of each power of ten, in plain digits."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")


def point_color(run: RunFacts, point: str) -> str:
    """The colour of a point, the same in every figure; the start is grey."""
    others = [name for name in run.points if name != "start"]
    return _START if point == "start" else _COLORS[others.index(point) % len(_COLORS)]


def draw_accuracy(run: RunFacts) -> Figure | None:
    """pass@1 at every point, a panel for each suite, a line for each group."""
    suites = [s for s in run.suites if any(run.metrics(p, s) for p in run.points)]
    if not suites:
        return None
    figure, axes = _panels(len(suites))
    for axis, suite in zip(axes, suites, strict=True):
        points = [point for point in run.points if run.metrics(point, suite)]
        entries: list[dict[str, Any]] = [run.metrics(point, suite) or {} for point in points]
        groups = run.groups(suite)
        for index, group in enumerate(groups if len(groups) > 1 else []):
            places = [i for i, entry in enumerate(entries) if group in entry.get("by_group", {})]
            values = [100 * entries[i]["by_group"][group]["pass_at_1"] for i in places]
            axis.plot(places, values, "o-", color=_COLORS[index % len(_COLORS)], lw=1, ms=3, label=group)
        _errorbar(axis, range(len(points)), entries, color="#222", label="all" if len(groups) > 1 else None, lw=2)
        axis.set_xticks(range(len(points)), points, rotation=20 if len(points) > 3 else 0)
        axis.set_xlim(-0.4, len(points) - 0.6)
        _percent_axis(axis)
        axis.set_title(suite)
        # Suites may have different groups.
        if len(groups) > 1 and len(suites) > 1:
            axis.legend(fontsize=8)
    if len(suites) == 1:
        _legend(figure, axes[0])
    axes[0].set_ylabel("pass@1, %")
    return figure


def draw_steps(run: RunFacts) -> Figure | None:
    """pass@1 by the number of reasoning steps, a panel for each suite, a line for each point."""
    suites = [s for s in run.suites if any((run.metrics(p, s) or {}).get("by_steps") for p in run.points)]
    if not suites:
        return None
    figure, axes = _panels(len(suites))
    for axis, suite in zip(axes, suites, strict=True):
        for point in run.points:
            by_steps = (run.metrics(point, suite) or {}).get("by_steps") or {}
            steps = sorted(by_steps, key=int)
            if steps:
                entries = [by_steps[step] for step in steps]
                _errorbar(axis, [int(s) for s in steps], entries, color=point_color(run, point), label=point)
        axis.xaxis.get_major_locator().set_params(integer=True)
        _percent_axis(axis)
        axis.set_title(suite)
        axis.set_xlabel("reasoning steps of the problem")
    axes[0].set_ylabel("pass@1, %")
    _legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure


def _errorbar(axis: Any, places: Sequence[int], entries: Sequence[dict[str, Any]], **style: Any) -> None:
    """Points with their 95% intervals."""
    values = [100 * entry["pass_at_1"] for entry in entries]
    below = [max(0.0, value - 100 * entry["interval"][0]) for value, entry in zip(values, entries, strict=True)]
    above = [max(0.0, 100 * entry["interval"][1] - value) for value, entry in zip(values, entries, strict=True)]
    axis.errorbar(list(places), values, yerr=[below, above], fmt="o-", ms=4, capsize=3, elinewidth=1, **style)


def _percent_axis(axis: Any) -> None:
    axis.set_ylim(-3, 103)
    axis.set_yticks([0, 25, 50, 75, 100])


def draw_loss(run: RunFacts) -> Figure | None:
    """Training loss by step, a panel for each stage: every log step, and a running mean."""
    stages = [stage for stage in run.stages if any("loss" in entry for entry in stage.log)]
    if not stages:
        return None
    figure, axes = _panels(len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        entries = [entry for entry in stage.log if "loss" in entry]
        steps, losses = [e["step"] for e in entries], [float(e["loss"]) for e in entries]
        color = point_color(run, stage.name)
        axis.plot(steps, losses, color=color, alpha=0.35, lw=1)
        axis.plot(steps, _running_mean(losses), color=color, lw=2)
        axis.set_title(stage.name)
        axis.set_xlabel("step")
        if min(losses) > 0:
            axis.set_yscale("log")
            _log_ticks(axis.yaxis)
    axes[0].set_ylabel("loss per supervised token")
    return figure


def _running_mean(values: Sequence[float]) -> list[float]:
    """Exponential, over about a fortieth of the values, and started without bias."""
    decay = 1 - 1 / max(2.0, len(values) / 40)
    mean = weight = 0.0
    smooth = []
    for value in values:
        mean = decay * mean + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        smooth.append(mean / weight)
    return smooth


def draw_lengths(run: RunFacts) -> Figure | None:
    """Histogram of completion tokens at each point, right ones over the others; log scale."""
    tokens: dict[str, tuple[list[int], list[int]]] = {}
    for (point, _), facts in run.results.items():
        right, other = tokens.setdefault(point, ([], []))
        for sample in read_samples(facts.samples):
            (right if sample["verdict"] == "right" else other).append(max(1, int(sample["tokens"])))
    points = [point for point in run.points if point in tokens and any(tokens[point])]
    if not points:
        return None
    everything = [length for point in points for lengths in tokens[point] for length in lengths]
    shortest, longest = min(everything), max(everything) + 1
    bins = [shortest * (longest / shortest) ** (index / 32) for index in range(33)]
    figure, axes = _panels(len(points), height=2.4)
    for axis, point in zip(axes, points, strict=True):
        right, other = tokens[point]
        axis.hist([right, other], bins=bins, stacked=True, color=["#3ca951", "#d7d7d7"], label=["right", "not right"])
        axis.set_xscale("log")
        axis.set_xlim(shortest / 1.1, longest * 1.1)
        _log_ticks(axis.xaxis)
        axis.set_title(point)
        axis.set_xlabel("tokens of the completion")
    axes[0].set_ylabel("samples")
    _legend(figure, axes[0])
    return figure


def draw_throughput(run: RunFacts) -> Figure | None:
    """Training throughput over the stages' time."""
    stages = [stage for stage in run.stages if any(entry.get("tokens_per_second") for entry in stage.log)]
    if not stages:
        return None
    figure, axes = _panels(1, height=2.6)
    began = 0.0
    for stage in stages:
        entries = [entry for entry in stage.log if entry.get("tokens_per_second") and "seconds" in entry]
        minutes = [(began + entry["seconds"]) / 60 for entry in entries]
        rates = [entry["tokens_per_second"] for entry in entries]
        axes[0].plot(minutes, rates, color=point_color(run, stage.name), label=stage.name)
        began += entries[-1]["seconds"] if entries else 0.0
    axes[0].set_ylim(0, 1.1 * axes[0].get_ylim()[1])
    axes[0].set_xlabel("minutes of training")
    axes[0].set_ylabel("tokens per second")
    _legend(figure, axes[0])
    return figure


FIGURES: dict[str, tuple[Callable[[RunFacts], Any], str]] = {
    "accuracy": (draw_accuracy, "Accuracy (pass@1) at each evaluation point, with 95% intervals."),
    "steps": (draw_steps, "Accuracy by the number of reasoning steps a problem needs, with 95% intervals."),
    "loss": (draw_loss, "Training loss of each stage: log steps (faint) and their running mean."),
    "lengths": (draw_lengths, "Lengths of the generated traces, in tokens."),
    "throughput": (draw_throughput, "Training throughput."),
}
