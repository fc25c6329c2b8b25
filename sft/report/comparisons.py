"""The report's section on what each stage changed: each point of the run against the one before, by problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from sft.evaluate.compared_text import DASH, change_text, p_text, points
from sft.evaluate.comparison import holm
from sft.evaluate.paired import Changed, Comparison, compare_samples
from sft.evaluate.sample_files import SuiteSamples, read_suite
from sft.report.collect import RunFacts
from sft.utils.errors import UserError

_SHOWN_CHANGES = 3


@dataclass(frozen=True)
class Step:
    """A suite's samples at one point of the run and at a later one."""

    suite: str
    before: str
    after: str
    found: Comparison


@dataclass
class Steps:
    """All of them, each suite's in the run's order, and its first point against its last; `notes`: sentences."""

    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def steps_of(run: RunFacts) -> Steps:
    """Compare what there is; samples that can't be read, or share no problem, are told in the notes."""
    found = Steps()
    for suite in run.suites:
        read: dict[str, SuiteSamples] = {}
        for point in run.own_points:
            if (point, suite) in run.results:
                try:
                    read[point] = read_suite(run.results[point, suite].samples, suite)
                except UserError as error:
                    found.notes.append(f"{suite} at {point} is left out: {error}")
        ends = [(next(iter(read)), list(read)[-1])] if len(read) > 2 else []
        for before, after in [*pairwise(read), *ends]:
            _add(found, suite, (before, read[before]), (after, read[after]))
    return found


def _add(found: Steps, suite: str, before: tuple[str, SuiteSamples], after: tuple[str, SuiteSamples]) -> None:
    try:
        step = Step(suite, before[0], after[0], compare_samples(before[1], after[1]))
    except UserError as error:
        found.notes.append(f"{suite} at {before[0]} and {after[0]}: {error}")
        return
    found.steps.append(step)
    found.notes += [f"{suite}, {before[0]} (A) to {after[0]} (B): {note}" for note in step.found.notes]


HEAD = ("suite", "from", "to", "problems", "gain", "95% interval", "p", "p (Holm)", "by vote", "cut off", "tokens",
        "gained", "lost", "seen")  # fmt: skip


def step_rows(found: Steps) -> list[list[str]]:
    """Cells below HEAD; differences of shares in percentage points."""
    corrected = holm([step.found.pass_at_1.p for step in found.steps])
    return [_row(step, p) for step, p in zip(found.steps, corrected, strict=True)]


def _row(step: Step, corrected: float | None) -> list[str]:
    one = step.found
    return [
        step.suite,
        step.before,
        step.after,
        f"{one.problems:,}",
        *points(one.pass_at_1),
        p_text(corrected),
        DASH if one.majority is None else points(one.majority)[0],
        DASH if one.cut_off is None else points(one.cut_off)[0],
        DASH if one.tokens is None else f"{one.tokens.value:+,.0f}",
        f"{len(one.gained):,}",
        f"{len(one.lost):,}",
        DASH if one.power.smallest is None else f"{100 * one.power.smallest:.1f}",
    ]


def changes_of(step: Step) -> Iterator[tuple[str, str, Changed]]:
    """(gained or lost, a line, the problem) of the largest changes."""
    for word, changes in (("gained", step.found.gained), ("lost", step.found.lost)):
        for change in changes[:_SHOWN_CHANGES]:
            yield word, change_text(change), change


def context(run: RunFacts) -> dict[str, Any]:
    """What the templates take."""
    found = steps_of(run)
    return {
        "step_head": HEAD,
        "step_rows": step_rows(found),
        "step_notes": found.notes,
        "step_changes": [(step, changes) for step in found.steps if (changes := list(changes_of(step)))],
    }
