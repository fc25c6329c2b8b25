"""What a run came to in one sentence, and the facts that anybody asks for first."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from sft.recipe.paths import RunPaths
from sft.report.collect import RunFacts, StageFacts
from sft.utils.files import read_sealed
from sft.utils.secrets import SECRET, is_secret_name

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe

_MOST_SUITES = 2


def verdict(run: RunFacts) -> str:
    """How far the run has got, and what became of the accuracy on each suite (of the loss where there is none).

    A change counts as one where the 95% intervals before and after don't overlap.
    """
    done = sum(stage.manifest is not None for stage in run.stages)
    alone = len(run.stages) == 1
    count = ("Trained" if done else "Not trained") if alone else f"{done} of {len(run.stages)} stages trained"
    started = any(stage.log for stage in run.stages)
    if not done:
        count = f"{count} yet" + (", one under way" if started else "")
    changes = [change for suite in run.suites if (change := _change(run, suite))]
    more = len(changes) - _MOST_SUITES
    told = [*changes[:_MOST_SUITES], *([f"{more} more suites below"] if more > 0 else [])]
    if not told:
        asked = any(stage.evaluate.suites for stage in run.recipe.stages)
        told = [*_losses(run), "nothing is evaluated yet" if asked else "no suite was asked for"]
    return f"{count}: {'; '.join(told)}."


def _change(run: RunFacts, suite: str) -> str:
    """What became of a suite's accuracy between the run's first and last point that has it."""
    points = [point for point in run.own_points if run.metrics(point, suite)]
    if not points:
        return ""
    first, last = (run.metrics(point, suite) or {} for point in (points[0], points[-1]))
    before, after = 100 * first["pass_at_1"], 100 * last["pass_at_1"]
    if len(points) == 1:
        where = "at the start" if points[0] == "start" else f"after {points[0]}"
        return f"{suite} {after:.1f}% right {where}"
    if last["interval"][0] > first["interval"][1]:
        return f"{suite} rose from {before:.1f}% to {after:.1f}% right"
    if last["interval"][1] < first["interval"][0]:
        return f"{suite} fell from {before:.1f}% to {after:.1f}% right"
    if f"{before:.1f}" == f"{after:.1f}":
        return f"{suite} stayed at {after:.1f}% right"
    return f"{suite} {before:.1f}% to {after:.1f}% right, within the 95% intervals"


def _losses(run: RunFacts) -> list[str]:
    """From which loss to which the last stage with a log went."""
    for stage in reversed(run.stages):
        losses = [entry["loss"] for entry in stage.log if "loss" in entry]
        if losses:
            return [f"loss {losses[0]:.4g} to {losses[-1]:.4g} in {stage.name}"]
    return []


def facts(run: RunFacts, paths: RunPaths) -> list[tuple[str, str]]:
    """(name, text) of base model, date, machine and command; only what is known."""
    told = [
        ("base model", base_model(run)),
        ("finished" if all(stage.manifest for stage in run.stages) else "last trained", _date(run, paths)),
        ("machine", _machine(run)),
        ("command", command(run, paths)),
    ]
    return [(name, text) for name, text in told if text]


def base_model(run: RunFacts) -> str:
    """What the run starts from."""
    model = run.recipe.model
    if model.model_name_or_path is None:
        return "none: random weights of a SambaY model"
    return model.model_name_or_path + (f" (revision {model.model_revision})" if model.model_revision else "")


def _date(run: RunFacts, paths: RunPaths) -> str:
    """When the last stage that has one wrote its manifest, else its log. A file's date, for reading alone."""
    for stage in reversed(run.stages):
        for path in (paths.stage_manifest(stage.name), paths.metrics(stage.name)):
            if path.is_file():
                return datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
    return ""


def _machine(run: RunFacts) -> str:
    found = run.environment
    if not found:
        return ""
    device, cores = found.get("device"), found.get("cpu_count")
    processes = _last(run).get("world_size") or 1
    parts = [f"{processes} x {device}" if device and processes > 1 else str(device or "")]
    parts += [f"{cores} CPU cores" if cores else "", str(found.get("platform") or "")]
    versions = [f"{name} {(found.get('packages') or {}).get(name)}" for name in ("torch", "sambay-sft")]
    return ", ".join([*filter(None, parts), *(text for text in versions if not text.endswith("None"))])


def _last(run: RunFacts) -> dict[str, Any]:
    done: list[StageFacts] = [stage for stage in run.stages if stage.manifest]
    return (done[-1].manifest if done else None) or {}


def command(run: RunFacts, paths: RunPaths) -> str:
    """What was typed: the recipe's file, and what the command line changed of it, an option a line."""
    document = run.recipe.given.document
    if document is None:
        return ""
    file = document.origin(()).place.rpartition(":")[0]
    words = map(shlex.quote, _without_secrets(overrides_of(run.recipe, paths)))
    options = "".join(f" \\\n  {word}" if word.startswith("--") else f" {word}" for word in words)
    return f"sft run {shlex.quote(file)}{options}" if file else ""


def overrides_of(recipe: Recipe, paths: RunPaths) -> list[str]:
    """What the command line set, as the run's record has it, else as the recipe was read."""
    record = read_sealed(paths.manifest)
    return list(map(str, (record or {}).get("overrides") or recipe.given.overrides))


def _without_secrets(words: list[str]) -> Iterator[str]:
    hide = False
    for word in words:
        option, equals, _ = word.partition("=")
        named = word.startswith("--") and is_secret_name(option.rpartition(".")[2], foreign=True)
        yield f"{option}={SECRET}" if named and equals else SECRET if hide and not word.startswith("--") else word
        hide = named and not equals
