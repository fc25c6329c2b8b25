"""The report's figures of training and evaluations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sft.evaluate.runner import read_samples
from sft.report.collect import RunFacts, StageFacts
from sft.report.drawing import COLORS, START, all_drawn, as_chart, legend, log_ticks, panels
from sft.report.readings import MARK

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_all(run: RunFacts) -> dict[str, tuple[str, bytes, str]]:
    """Name -> (HTML with SVG, PNG bytes, caption) of every figure for which there is data."""
    return all_drawn(FIGURES, run, as_chart)


def point_color(run: RunFacts, point: str) -> str:
    """The colour of a point, the same in every figure; the start is grey."""
    others = [name for name in run.points if name != "start"]
    return START if point == "start" else COLORS[others.index(point) % len(COLORS)]


def draw_accuracy(run: RunFacts) -> Figure | None:
    """pass@1 at every point, a panel for each suite, a line for each group."""
    suites = [s for s in run.suites if any(run.metrics(p, s) for p in run.points)]
    if not suites:
        return None
    figure, axes = panels(len(suites))
    for axis, suite in zip(axes, suites, strict=True):
        points = [point for point in run.points if run.metrics(point, suite)]
        own = sum(point in run.own_points for point in points)
        entries: list[dict[str, Any]] = [run.metrics(point, suite) or {} for point in points]
        groups = run.groups(suite)
        for index, group in enumerate(groups if len(groups) > 1 else []):
            places = [i for i, entry in enumerate(entries) if group in entry.get("by_group", {})]
            values = [100 * entries[i]["by_group"][group]["pass_at_1"] for i in places]
            color, mine = COLORS[index % len(COLORS)], sum(place < own for place in places)
            axis.plot(places[:mine], values[:mine], "o-", color=color, lw=1, ms=3, label=group)
            axis.plot(places[mine:], values[mine:], "o", color=color, ms=3)
        if entries[:own]:
            errorbar(axis, range(own), entries[:own], color="#222", label="all" if len(groups) > 1 else None, lw=2)
        if entries[own:]:  # other models are no part of the way: nothing joins them to it
            errorbar(axis, range(own, len(points)), entries[own:], color="#222", lw=0)
        axis.set_xticks(range(len(points)), points, rotation=20 if len(points) > 3 else 0)
        axis.set_xlim(-0.4, len(points) - 0.6)
        percent_axis(axis)
        axis.set_title(suite)
        # Suites may have different groups.
        if len(groups) > 1 and len(suites) > 1:
            axis.legend(fontsize=8)
    if len(suites) == 1:
        legend(figure, axes[0])
    axes[0].set_ylabel("pass@1, %")
    return figure


def draw_steps(run: RunFacts) -> Figure | None:
    """pass@1 by the number of reasoning steps, a panel for each suite, a line for each point."""
    suites = [s for s in run.suites if any((run.metrics(p, s) or {}).get("by_steps") for p in run.points)]
    if not suites:
        return None
    figure, axes = panels(len(suites))
    for axis, suite in zip(axes, suites, strict=True):
        for point in run.points:
            by_steps = (run.metrics(point, suite) or {}).get("by_steps") or {}
            steps = sorted(by_steps, key=int)
            if steps:
                entries = [by_steps[step] for step in steps]
                errorbar(axis, [int(s) for s in steps], entries, color=point_color(run, point), label=point)
        axis.xaxis.get_major_locator().set_params(integer=True)
        percent_axis(axis)
        axis.set_title(suite)
        axis.set_xlabel("reasoning steps of the problem")
    axes[0].set_ylabel("pass@1, %")
    legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure


def errorbar(axis: Any, places: Sequence[int], entries: Sequence[dict[str, Any]], **style: Any) -> None:
    """Points with their 95% intervals."""
    values = [100 * entry["pass_at_1"] for entry in entries]
    below = [max(0.0, value - 100 * entry["interval"][0]) for value, entry in zip(values, entries, strict=True)]
    above = [max(0.0, 100 * entry["interval"][1] - value) for value, entry in zip(values, entries, strict=True)]
    axis.errorbar(list(places), values, yerr=[below, above], fmt="o-", ms=4, capsize=3, elinewidth=1, **style)


def percent_axis(axis: Any) -> None:
    """From 0 to 100, with room for marks at both ends."""
    axis.set_ylim(-3, 103)
    axis.set_yticks([0, 25, 50, 75, 100])


def draw_loss(run: RunFacts) -> Figure | None:
    """Training loss by step, a panel for each stage: every log step, a running mean, and the held-out rows' loss."""
    stages = [stage for stage in run.stages if any("loss" in entry for entry in stage.log)]
    if not stages:
        return None
    figure, axes = panels(len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        entries = [entry for entry in stage.log if "loss" in entry]
        steps, losses = [e["step"] for e in entries], [float(e["loss"]) for e in entries]
        color = point_color(run, stage.name)
        axis.plot(steps, losses, color=color, alpha=0.35, lw=1, label="loss")
        axis.plot(steps, _running_mean(losses), color=color, lw=2, label="running mean")
        held = [entry for entry in stage.log if "eval_loss" in entry]
        if held:
            values = [float(entry["eval_loss"]) for entry in held]
            axis.plot([e["step"] for e in held], values, "o-", color="#222", lw=1, ms=4, label="held-out rows")
            axis.legend(fontsize=8)
            losses += values
        axis.set_title(stage.name)
        axis.set_xlabel("step")
        if min(losses) > 0:
            axis.set_yscale("log")
            log_ticks(axis.yaxis)
    axes[0].set_ylabel("loss per supervised token")
    return figure


_WHILE_TRAINING = re.compile(r"eval_(.+)/pass_at_1")


def draw_while_training(run: RunFacts) -> Figure | None:
    """pass@1 of the suites that were answered while stages trained, by step, a panel for each stage."""
    curves = {stage.name: found for stage in run.stages if (found := _curves(stage))}
    if not curves:
        return None
    figure, axes = panels(len(curves))
    suites = list(dict.fromkeys(suite for found in curves.values() for suite in found))
    for axis, (name, found) in zip(axes, curves.items(), strict=True):
        for suite, places in found.items():
            steps, values = zip(*places, strict=True)
            axis.plot(steps, values, "o-", color=COLORS[suites.index(suite) % len(COLORS)], lw=1, ms=4, label=suite)
        percent_axis(axis)
        axis.set_title(name)
        axis.set_xlabel("step")
    axes[0].set_ylabel("pass@1, %")
    legend(figure, max(axes, key=lambda axis: len(axis.get_legend_handles_labels()[1])))
    return figure


def _curves(stage: StageFacts) -> dict[str, list[tuple[int, float]]]:
    """By suite: (step, pass@1 in percent)."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for entry in stage.log:
        for name, value in entry.items():
            if found := _WHILE_TRAINING.fullmatch(name):
                curves.setdefault(found[1], []).append((entry["step"], 100 * float(value)))
    return curves


ACCURACY, ENTROPY = "mean_token_accuracy", "entropy"
"""What the log calls the share of supervised tokens that are predicted, and the mean entropy there."""


def draw_token_accuracy(run: RunFacts) -> Figure | None:
    """Share of the trained tokens that the model finds likeliest, by step, a panel for each stage."""
    return _by_source(run, ACCURACY, 100, "tokens predicted, %")


def draw_entropy(run: RunFacts) -> Figure | None:
    """The mean entropy of the distributions that trained tokens are predicted by, by step, a panel for each stage."""
    return _by_source(run, ENTROPY, 1, "entropy, nats")


def _by_source(run: RunFacts, key: str, factor: float, label: str) -> Figure | None:
    """A number of the log: of all tokens and, where there are several sources, of each one's."""
    stages = [stage for stage in run.stages if any(key in entry for entry in stage.log)]
    if not stages:
        return None
    figure, axes = panels(len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        axis.plot(*_curve(stage.log, key, factor), color="#222", lw=2, label="all")
        sources = sorted({name for entry in stage.log for name in entry if name.startswith(f"{key}/")})
        for index, name in enumerate(sources):
            color = COLORS[index % len(COLORS)]
            axis.plot(*_curve(stage.log, name, factor), color=color, lw=1, label=name.partition("/")[2])
        if sources:
            axis.legend(fontsize=8)
        axis.set_title(stage.name)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel(label)
    return figure


def _curve(entries: Sequence[dict[str, Any]], key: str, factor: float) -> tuple[list[int], list[float]]:
    """Steps and values of the entries that have one."""
    found = [entry for entry in entries if key in entry]
    return [entry["step"] for entry in found], [factor * float(entry[key]) for entry in found]


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


def length_bins(lengths: Sequence[int]) -> list[float]:
    """The edges of 32 bins, each as many times as long as the one before; lengths that are alike get room around them,
    or their bar would be too thin to be seen."""
    shortest, longest = min(lengths), max(lengths) + 1
    room = max(1.0, 1.5 * shortest / longest) ** 0.5
    low, high = shortest / room, longest * room
    return [low * (high / low) ** (index / 32) for index in range(33)]


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
    bins = length_bins(everything)
    figure, axes = panels(len(points), height=2.4)
    for axis, point in zip(axes, points, strict=True):
        right, other = tokens[point]
        axis.hist([right, other], bins=bins, stacked=True, color=[COLORS[1], "#a4abb3"], label=["right", "not right"])
        axis.set_xscale("log")
        axis.set_xlim(bins[0] / 1.1, bins[-1] * 1.1)
        log_ticks(axis.xaxis)
        axis.set_title(point)
        axis.set_xlabel("tokens of the completion")
    axes[0].set_ylabel("samples")
    legend(figure, axes[0])
    return figure


def draw_throughput(run: RunFacts) -> Figure | None:
    """Training throughput over the stages' time, and what explains its dips."""
    stages = [stage for stage in run.stages if any(map(_has_rate, stage.log))]
    if not stages:
        return None
    figure, axes = panels(1, height=2.6)
    began, marks = 0.0, _Marks()
    for number, stage in enumerate(stages):
        entries = [entry for entry in stage.log if _has_rate(entry)]
        minutes = [(began + entry["seconds"]) / 60 for entry in entries]
        rates = [entry["tokens_per_second"] for entry in entries]
        axes[0].plot(minutes, rates, color=point_color(run, stage.name), label=stage.name)
        marks.add(stage, entries, minutes, rates)
        before = stages[number - 1].name if number else "start"
        if any((before, suite) in run.results for suite in run.suites):
            marks.evaluated.append(began / 60)
        began += entries[-1]["seconds"]
    marks.draw(axes[0])
    axes[0].set_ylim(0, 1.1 * axes[0].get_ylim()[1])
    axes[0].set_xlabel("minutes of training")
    axes[0].set_ylabel("tokens per second")
    legend(figure, axes[0])
    return figure


def _has_rate(entry: dict[str, Any]) -> bool:
    return bool(entry.get("tokens_per_second")) and "seconds" in entry


class _Marks:
    """What takes time of a training beside its steps: where each came on the curve of the throughput."""

    def __init__(self) -> None:
        self.evaluated: list[float] = []
        self._places: dict[str, list[tuple[float, float]]] = {event: [] for event, *_ in EVENTS}

    def add(self, stage: StageFacts, entries: list[dict[str, Any]], minutes: list[float], rates: list[float]) -> None:
        """The events of a stage, each on the log entry whose window it fell into."""
        for event, step in stage.events:
            # A checkpoint is written after its step, and a restart begins after its own: both slow down the next.
            later = [place for place, entry in enumerate(entries) if entry["step"] > step]
            if event in self._places and later:
                self._places[event].append((minutes[later[0]], rates[later[0]]))

    def draw(self, axis: Any) -> None:
        """Marks with their names in the legend."""
        for event, style, color in EVENTS:
            if places := self._places[event]:
                x, y = zip(*places, strict=True)
                axis.plot(x, y, style, color=color, ms=5, label=event, gid=MARK, zorder=3)
        for number, minute in enumerate(self.evaluated):
            axis.axvline(minute, color=START, lw=1, ls="--", label="_" if number else "evaluation")


EVENTS = (("checkpoint", "v", "#444"), ("restart", "D", "#d9482b"))
"""Name in `events.jsonl`, marker, colour."""


FIGURES: dict[str, tuple[Callable[[RunFacts], Any], str]] = {
    "accuracy": (draw_accuracy, "Accuracy (pass@1) at each evaluation point, with 95% intervals."),
    "steps": (draw_steps, "Accuracy by the number of reasoning steps a problem needs, with 95% intervals."),
    "loss": (
        draw_loss,
        "Training loss of each stage: log steps (faint), running mean, and held-out rows, if any (black).",
    ),
    "while_training": (draw_while_training, "Accuracy (pass@1) of the suites that were answered while stages trained."),
    "token_accuracy": (
        draw_token_accuracy,
        "How many of the trained tokens the model finds likeliest, of all and of each source. Close to 100% it knows "
        "them by heart.",
    ),
    "entropy": (draw_entropy, "The mean entropy of its predictions of trained tokens, of all and of each source."),
    "lengths": (draw_lengths, "Lengths of the generated traces, in tokens."),
    "throughput": (
        draw_throughput,
        "Training throughput between two log steps. It dips where a checkpoint was written, where a run that had "
        "stopped went on, and where a stage begins (after an evaluation, if there was one): its first steps warm up. "
        "Without packing it follows the lengths of the rows.",
    ),
}
