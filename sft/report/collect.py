"""Everything a report tells, read from the files of a run; whatever isn't there yet is named, not guessed."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.recipe.paths import RunPaths
from sft.recipe.schema import Recipe, Stage
from sft.utils.files import read_sealed, sha256_file


@dataclass
class StageFacts:
    """One stage: its manifest (None: not done), its log lines (empty: not begun), and (event, step) of what else came
    while it was trained."""

    name: str
    manifest: dict[str, Any] | None
    log: list[dict[str, Any]]
    events: list[tuple[str, int]] = field(default_factory=list)

    @property
    def data(self) -> dict[str, Any]:
        """The manifest of the prepared data, or an empty mapping."""
        return dict((self.manifest or {}).get("data") or {})

    def total(self, name: str) -> float | None:
        """A counter over the whole stage (tokens, supervised_tokens, seconds), or None."""
        counters = (self.manifest or {}).get("counters") or {}
        value = counters.get(name, next((entry[name] for entry in reversed(self.log) if name in entry), None))
        return None if value is None else float(value)


@dataclass
class SuiteFacts:
    """One suite at one point: its metrics and where its samples are."""

    point: str
    suite: str
    metrics: dict[str, Any]
    samples: Path


@dataclass
class RunFacts:
    """A run. `points` and `suites` are in the recipe's order, other models' behind the run's own; `missing` says in
    sentences what isn't there."""

    recipe: Recipe
    root: Path
    stages: list[StageFacts]
    points: list[str]
    suites: list[str]
    results: dict[tuple[str, str], SuiteFacts]
    parameters: int | None
    environment: dict[str, Any]
    missing: list[str] = field(default_factory=list)

    def metrics(self, point: str, suite: str) -> dict[str, Any] | None:
        """The metrics of a suite at a point, or None."""
        facts = self.results.get((point, suite))
        return facts.metrics if facts else None

    @property
    def own_points(self) -> list[str]:
        """The points of the run itself: other models that were evaluated beside it are no part of its way."""
        return [point for point in self.points if point == "start" or point in {stage.name for stage in self.stages}]

    def heading(self, point: str) -> str:
        """A point as a table's head."""
        return point if point == "start" or point not in self.own_points else f"after {point}"

    def groups(self, suite: str) -> list[str]:
        """The groups of a suite's problems, over all points."""
        found: dict[str, None] = {}
        for point in self.points:
            found.update(dict.fromkeys((self.metrics(point, suite) or {}).get("by_group", {})))
        return list(found)


def collect(recipe: Recipe, paths: RunPaths) -> RunFacts:
    """Read the run below `paths.root`. Files that are missing or broken are told in `missing`."""
    missing: list[str] = []
    stages = [_stage(paths, stage, missing) for stage in recipe.stages]
    points = ["start", *(stage.name for stage in recipe.stages)]
    suites = list(dict.fromkeys(suite.name for stage in recipe.stages for suite in stage.evaluate.suites))
    results = _results(paths, points, suites, missing)
    manifest = next((stage.manifest for stage in reversed(stages) if stage.manifest), {})
    _expected(recipe, stages, results, paths, missing)
    # Without suites, and where no stage evaluates its start, there is no such point.
    points = [p for p in points if any((p, s) in results for s in suites) or p != "start"]
    return RunFacts(
        recipe=recipe,
        root=paths.root,
        stages=stages,
        points=points,
        suites=suites,
        results=results,
        parameters=_parameters(recipe, paths),
        environment=dict(manifest.get("environment") or {}),
        missing=missing,
    )


def _stage(paths: RunPaths, stage: Stage, missing: list[str]) -> StageFacts:
    manifest = _mapping(paths.stage_manifest(stage.name), missing)
    log = read_log(paths.metrics(stage.name))
    if manifest is not None and log and manifest.get("metrics") not in (None, sha256_file(paths.metrics(stage.name))):
        missing.append(f"Stage {stage.name}: {paths.metrics(stage.name)} was changed after training, and is left out.")
        log = []
    if manifest is None:
        state = f"interrupted after step {log[-1]['step']}" if log else "not trained yet"
        missing.append(f"Stage {stage.name}: {state}.")
    events = [(str(entry.get("event")), int(entry["step"])) for entry in read_log(paths.events(stage.name))]
    return StageFacts(stage.name, manifest, log, list(dict.fromkeys(events)))


def _results(
    paths: RunPaths, points: list[str], suites: list[str], missing: list[str]
) -> dict[tuple[str, str], SuiteFacts]:
    """Finished evaluations; other models and suites that were evaluated in this folder join `points` and `suites`."""
    eval_root = paths.eval_dir("start").parent
    found = sorted(path.parent for path in eval_root.glob("*/*/metrics.json"))
    points.extend(dict.fromkeys(path.parent.name for path in found if path.parent.name not in points))
    suites.extend(dict.fromkeys(path.name for path in found if path.name not in suites))
    results = {}
    for folder in found:
        metrics = _mapping(folder / "metrics.json", missing)
        if metrics is not None:
            point, suite = folder.parent.name, folder.name
            results[point, suite] = SuiteFacts(point, suite, metrics, folder / "samples.jsonl")
    return results


def _expected(
    recipe: Recipe,
    stages: list[StageFacts],
    results: dict[tuple[str, str], SuiteFacts],
    paths: RunPaths,
    missing: list[str],
) -> None:
    """Name the evaluations that the recipe asks for and that aren't there."""
    first = recipe.stages[0].evaluate
    wanted = [("start", suite.name) for suite in first.suites if first.before_first_stage]
    for stage, facts in zip(recipe.stages, stages, strict=True):
        wanted += [(stage.name, suite.name) for suite in stage.evaluate.suites if facts.manifest]
    for point, suite in wanted:
        if (point, suite) not in results:
            path = paths.eval_dir(point, suite) / "samples.jsonl"
            done = path.read_bytes().count(b"\n") if path.exists() else 0
            state = f"interrupted after {done} answers" if done else "not evaluated yet"
            missing.append(f"Suite {suite} at {point}: {state}.")


def _mapping(path: Path, missing: list[str]) -> dict[str, Any] | None:
    """The JSON mapping in `path`, or None; a file that is there and can't be read is told."""
    if not path.exists():
        return None
    value = read_sealed(path)
    if value is None:
        missing.append(f"{path} can't be read and is left out.")
        return None
    return value


def read_log(path: Path) -> list[dict[str, Any]]:
    """The log lines of a stage that have a step, in order; a torn line is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and "step" in value:
            lines.append(value)
    return sorted(lines, key=lambda entry: entry["step"])


def _parameters(recipe: Recipe, paths: RunPaths) -> int | None:
    """How many parameters the model has, from the headers of saved weights; adapters alone don't tell."""
    folders = [paths.export, *(paths.final_dir(stage.name) for stage in reversed(recipe.stages))]
    if recipe.model.model_name_or_path:
        folders.append(Path(recipe.model.model_name_or_path))
    for folder in folders:
        files = sorted(folder.glob("model*.safetensors")) if folder.is_dir() else []
        if files:
            return sum(map(_elements, files))
    return None


def _elements(path: Path) -> int:
    """The number of values in a safetensors file: its header, a JSON mapping, follows an 8-byte length."""
    with open(path, "rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
