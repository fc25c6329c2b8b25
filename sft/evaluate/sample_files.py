"""Evaluations by name: a run, a stage of it, a folder of results or a samples file, and the samples that are there."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sft.evaluate.metrics import Sample
from sft.evaluate.runner import CHECK, read_samples
from sft.recipe.paths import RunPaths
from sft.recipe.problems import nearest
from sft.recipe.schema import Recipe
from sft.utils.errors import UsageError, UserError, shown
from sft.utils.files import read_sealed, sha256_file

SAMPLES, METRICS, UNDER_WAY = "samples.jsonl", "metrics.json", "progress.json"
VERDICTS = ("right", "wrong", "undecided")


@dataclass(frozen=True)
class SuiteSamples:
    """A suite's samples. `settings`: how they were made, empty where nothing says so; `notes`: what isn't as it was."""

    suite: str
    path: Path
    samples: list[Sample]
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What a name means: how it is called, and where its suites' samples are. `alone`: a suite by itself, whose name
    says little."""

    name: str
    files: Mapping[str, Path]
    alone: bool

    def read(self, suite: str) -> SuiteSamples:
        """The samples of one of its suites."""
        return read_suite(self.files[suite], suite)


# ---- by name ----


def find_evaluation(name: str) -> Evaluation:
    """The evaluation that is meant by a samples file, the folder of a suite or of a point (`eval/POINT`), a stage's
    folder, RUN:POINT (a stage or `start`), or a run's folder: its last stage that is evaluated.

    Raises UsageError for what isn't there, and UserError where nothing is evaluated.
    """
    path = Path(name)
    if path.is_file():
        return Evaluation(name, {_suite_name(path): path}, alone=True)
    if path.is_dir():
        return _in_folder(name.rstrip("/") or name, path)
    run, colon, point = name.rpartition(":")
    if colon and Path(run).is_dir():
        return _point(Path(run), point)
    raise UsageError(
        f"{shown(name)}: there is no such file or folder; name a run's folder, RUN:STAGE, a folder of results, or a "
        f"{SAMPLES}"
    )


def _in_folder(name: str, folder: Path) -> Evaluation:
    if (folder / SAMPLES).is_file():
        return Evaluation(name, {_suite_name(folder / SAMPLES): folder / SAMPLES}, alone=True)
    if suites := _suites(folder):
        return Evaluation(name, suites, alone=False)
    if folder.parent.name == "stages":
        return _point(folder.parent.parent, folder.name)
    run = folder.parent if folder.name == "eval" else folder
    points = _points(run)
    if not points:
        raise UserError(f"{shown(name)}: no evaluation is there; `sft eval` makes one, or name a {SAMPLES}")
    order = [point for point in ("start", *_stages(run)) if point in points]
    if not order and len(points) > 1:
        raise UserError(f"{shown(str(run))}: which of its evaluations is meant? Say {_choices(run, points)}")
    return _point(run, (order or points)[-1])


def _point(run: Path, point: str) -> Evaluation:
    points = _points(run)
    if point not in points:
        told = nearest(point, points) or f"; there are {', '.join(points)}" if points else "; nothing else is, either"
        raise UserError(f"{shown(f'{run}:{point}')}: {shown(point)} is not evaluated{shown(told)}")
    return Evaluation(f"{run}:{point}", _suites(_paths(run).eval_dir(point)), alone=False)


def _choices(run: Path, points: Iterable[str]) -> str:
    return shown(" or ".join(f"{run}:{point}" for point in points))


def _points(run: Path) -> list[str]:
    """The points of a run that have samples."""
    root = _paths(run).eval_dir("start").parent
    return sorted({path.parent.parent.name for path in root.glob(f"*/*/{SAMPLES}")})


def _suites(folder: Path) -> dict[str, Path]:
    return {path.parent.name: path for path in sorted(folder.glob(f"*/{SAMPLES}"))}


def _stages(run: Path) -> list[str]:
    """The run's stages in order, as its recipe has them; none where that can't be read."""
    try:
        recipe = yaml.safe_load(_paths(run).resolved.read_text(encoding="utf-8"))
        return [str(stage["name"]) for stage in recipe["stages"]]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError):
        return []


def _paths(run: Path) -> RunPaths:
    return RunPaths(Recipe.model_construct(output_dir=str(run), prepared_dir=None))


def _suite_name(path: Path) -> str:
    return path.resolve().parent.name if path.name == SAMPLES else path.stem


def shared_suites(a: Evaluation, b: Evaluation) -> list[tuple[str, str]]:
    """The suites of both by name; or the only ones, where one of them is a suite by itself: then content decides."""
    shared = [(suite, suite) for suite in a.files if suite in b.files]
    if not shared and len(a.files) == len(b.files) == 1 and (a.alone or b.alone):
        return list(zip(a.files, b.files, strict=True))
    return shared


# ---- samples ----


def read_suite(path: Path, suite: str) -> SuiteSamples:
    """The samples in `path`, and how they were made, from what stands beside them.

    A file of our own is checked line by line, unless it is still what its metrics.json was made of; torn and changed
    lines are left out, and told in `notes`. One of another origin needs question (or prompt), gold and verdict in each
    line. Raises UserError for an evaluation that isn't finished (what came first is what is short), for a line that
    can't be used, and where there is none.
    """
    metrics = read_sealed(path.with_name(METRICS)) if path.name == SAMPLES else None
    if metrics is None and path.name == SAMPLES and path.with_name(UNDER_WAY).exists():
        raise UserError(
            f"{shown(str(path))}: this evaluation isn't finished, and the answers that come first are the short ones; "
            "`sft eval` continues it"
        )
    try:
        samples, notes = _read(path, metrics)
    except OSError as error:
        raise UserError(f"{shown(str(path))} can't be read: {error.strerror or error}") from error
    if not samples:
        raise UserError(f"{shown(str(path))} has no samples")
    settings = dict((metrics or {}).get("settings") or {})
    if metrics and "dtype" in metrics:
        settings["dtype"] = metrics["dtype"]
    return SuiteSamples(suite, path, samples, settings, tuple(notes))


def _read(path: Path, metrics: Mapping[str, Any] | None) -> tuple[list[Sample], list[str]]:
    intact = metrics is not None and metrics.get("content") == sha256_file(path)
    with open(path, "rb") as handle:
        lines = [(number, line) for number, line in enumerate(handle, 1) if line.strip()]
    if intact or not _is_ours(lines):
        return [_sample(path, number, line) for number, line in lines], []
    samples, notes = read_samples(path), []
    if metrics is not None and "content" in metrics:
        notes.append(f"{path} was changed after it was scored.")
    if lost := len(lines) - len(samples):
        notes.append(f"{lost} of {len(lines)} lines of {path} are torn, changed or repeated, and are left out.")
    return samples, notes


def _is_ours(lines: list[tuple[int, bytes]]) -> bool:
    """Whether lines have sums of themselves: then one that hasn't is torn."""
    return any(b'"' + CHECK.encode() + b'":' in line for _, line in lines)


def _sample(path: Path, number: int, line: bytes) -> Sample:
    place = f"{shown(str(path))}:{number}"
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not a line of JSON; is this a file of samples?") from error
    if not isinstance(sample, dict):
        raise UserError(f"{place}: is no JSON object; is this a file of samples?")
    sample.pop(CHECK, None)
    asked = sample.get("question", sample.get("prompt"))
    if not isinstance(asked, str) or not isinstance(sample.get("gold"), str | int | float):
        raise UserError(f"{place}: a sample has a question (or prompt) and a gold answer; this one hasn't")
    if sample.get("verdict") not in VERDICTS:
        raise UserError(f"{place}: verdict is {sample.get('verdict')!r:.40}, not one of {', '.join(VERDICTS)}")
    for key in ("answer", "completion"):
        if not isinstance(sample.get(key), str | int | float | None):
            raise UserError(f"{place}: {key} is no text: {sample[key]!r:.40}")
    if sample.get("answer") is not None:
        sample["answer"] = str(sample["answer"])
    return sample
