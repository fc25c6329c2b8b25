"""The report's tables as rows of text, the same for HTML and Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sft.data.engine.accounts import HEAD, funnel_lines, has_steps
from sft.recipe.outcome_keys import handed_on
from sft.report.collect import RunFacts, StageFacts


@dataclass(frozen=True)
class Cell:
    """One result: the value, its interval, and the gain over the point before it (in percentage points)."""

    value: str
    interval: str = ""
    gain: float | None = None

    @property
    def gain_text(self) -> str:
        """The gain with its sign, or nothing."""
        return "" if self.gain is None else f"{self.gain:+.1f}"


NONE = Cell("–")


@dataclass(frozen=True)
class ResultRow:
    """A suite (`group` empty) or one of its groups, at every point."""

    suite: str
    group: str
    problems: str
    cells: list[Cell]
    total_gain: float | None


def result_rows(run: RunFacts) -> list[ResultRow]:
    """pass@1 by point, for every suite and each of its groups."""
    rows = []
    for suite in run.suites:
        if not any(run.metrics(point, suite) for point in run.points):
            continue
        rows.append(_row(run, suite, ""))
        groups = run.groups(suite)
        rows += [_row(run, suite, group) for group in (groups if len(groups) > 1 else [])]
    return rows


def _row(run: RunFacts, suite: str, group: str) -> ResultRow:
    cells: list[Cell] = []
    values: list[float] = []
    problems: set[int] = set()
    for point in run.points:
        metrics = run.metrics(point, suite)
        entry = (metrics or {}).get("by_group", {}).get(group) if group else metrics
        if not entry:
            cells.append(NONE)
            continue
        value, (low, high) = 100 * entry["pass_at_1"], entry["interval"]
        own = point in run.own_points
        gain = value - values[-1] if values and own else None
        cells.append(Cell(f"{value:.1f}%", f"{100 * low:.1f} to {100 * high:.1f}", gain))
        values += [value] if own else []
        problems.add(entry["problems"])
    total = values[-1] - values[0] if len(values) > 1 else None
    return ResultRow(suite, group, " / ".join(map(str, sorted(problems))), cells, total)


TRAINING_HEAD = (
    "stage",
    "steps",
    "epochs",
    "tokens",
    "supervised",
    "time",
    "tokens/s",
    "final loss",
    "what is trained",
)


def training_rows(run: RunFacts) -> list[list[str]]:
    """What each stage did; a stage that isn't done shows what is known."""
    rows = []
    for stage in run.stages:
        manifest = stage.manifest or {}
        seconds, tokens = stage.total("seconds"), stage.total("tokens")
        last: dict[str, Any] = next((entry for entry in reversed(stage.log) if "loss" in entry), {})
        loss = manifest.get("final_loss", last.get("loss"))
        epochs = manifest.get("epochs", last.get("epoch"))
        rows.append(
            [
                stage.name if manifest else f"{stage.name} (not done)",
                count(manifest.get("steps", last.get("step"))),
                "–" if epochs is None else f"{epochs:.2f}",
                count(tokens),
                count(stage.total("supervised_tokens")),
                duration(seconds),
                count(tokens / seconds) if tokens and seconds else "–",
                ("–" if loss is None else f"{loss:.4f}") + _held_out(manifest.get("validation")),
                _trained(stage) if manifest else "–",
            ]
        )
    return rows


def _held_out(validation: dict[str, Any] | None) -> str:
    """The loss of held-out rows before and after a stage, behind that of trained ones."""
    return f" (held out: {validation['loss_at_start']:.4f} to {validation['loss_at_end']:.4f})" if validation else ""


def _trained(stage: StageFacts) -> str:
    manifest = stage.manifest or {}
    lora, other = manifest.get("lora"), handed_on(manifest)
    trained = "all weights"
    if isinstance(lora, dict):
        trained = f"{'DoRA' if lora.get('use_dora') else 'LoRA'} adapters of rank {lora.get('r', '?')}"
    return f"{trained}; hands on {other}" if other else trained


DATA_HEAD = (
    "stage",
    "rows read",
    "dropped",
    "held out",
    "truncated",
    "kept",
    "packs",
    "tokens",
    "supervised",
    "longest",
)


def data_rows(run: RunFacts) -> list[list[str]]:
    """The funnel of each stage's data: read (and made by steps) = kept + held out + dropped, with the reasons."""
    rows = []
    for stage in run.stages:
        data = stage.data
        funnel = data.get("funnel") or {}
        rows.append(
            [
                stage.name,
                count(funnel.get("rows", data.get("rows"))) + (f" ({funnel['made']:+,})" if funnel.get("made") else ""),
                _dropped(funnel) if funnel else "–",
                count(funnel.get("held_out")),
                count(funnel.get("truncated")),
                count(funnel.get("kept", data.get("documents"))),
                count(data.get("packs")),
                count(data.get("tokens")),
                count(data.get("supervised_tokens")),
                count(data.get("max_document_length")),
            ]
        )
    return rows


FUNNEL_HEAD = HEAD


def funnel_rows(stage: StageFacts) -> list[list[str]]:
    """What became of the stage's rows, step by step; empty where its data has no steps."""
    return [line.cells for line in funnel_lines(stage.data)] if has_steps(stage.data) else []


def _dropped(funnel: dict[str, Any]) -> str:
    dropped = {reason: number for reason, number in (funnel.get("dropped") or {}).items() if number}
    bad = ", ".join(f"{number} {reason}" for reason, number in (funnel.get("bad") or {}).items())
    parts = [
        f"{number} {reason}" + (f" ({bad})" if reason == "bad" and bad else "") for reason, number in dropped.items()
    ]
    return "; ".join(parts) or "0"


EVALUATION_HEAD = (
    "after", "suite", "problems", "samples each", "right", "wrong", "undecided", "cut off",
    "mean tokens", "90% below", "temperature", "limit", "time", "tokens/s",
)  # fmt: skip


def evaluation_rows(run: RunFacts) -> list[list[str]]:
    """How each evaluation went: verdicts, lengths, settings, speed."""
    rows = []
    for suite in run.suites:
        for point in run.points:
            metrics = run.metrics(point, suite)
            if metrics is None:
                continue
            verdicts, settings = metrics.get("verdicts") or {}, metrics.get("settings") or {}
            lengths = (metrics.get("tokens") or {}).get("all") or {}
            rows.append(
                [
                    point,
                    suite,
                    count(metrics.get("problems")),
                    count(settings.get("samples_per_problem")),
                    *(count(verdicts.get(name, 0)) for name in ("right", "wrong", "undecided")),
                    f"{100 * metrics.get('cut_off', 0):.1f}%",
                    count(lengths.get("mean")),
                    count(lengths.get("p90")),
                    _temperature(settings),
                    count(settings.get("max_new_tokens")),
                    duration(metrics.get("seconds")),
                    count(metrics.get("tokens_per_second")),
                ]
            )
    return rows


def _temperature(settings: dict[str, Any]) -> str:
    if not settings.get("temperature"):
        return "greedy"
    top_p = settings.get("top_p", 1.0)
    return f"{settings['temperature']:g}" + (f", top_p {top_p:g}" if top_p < 1 else "")


def count(value: float | None) -> str:
    """A number for reading: grouped digits, rounded to whole ones; a dash for None."""
    return "–" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Seconds for reading: '45 s', '12 min 05 s', '3 h 07 min'; a dash for None."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
