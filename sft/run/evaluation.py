"""Evaluations of a run: the start, a stage's model, or any other model on a stage's suites."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.asked import asked_as
from sft.run.checks import check_recipe
from sft.run.identity import point_identity, trained_stages, untrained_stages
from sft.run.lock import lock_for_all
from sft.run.sharing import copy_folder
from sft.utils.distributed import alike, check_shared_folder, decide, together
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage


def evaluate_point(paths: RunPaths, stage: str | None, others: Sequence[RunPaths] = ()) -> dict[str, Any]:
    """Evaluate the model after `stage` (None: the start) on its suites, unless that is done with the same settings.

    `others`: runs that may have done it. Returns the metrics by suite; empty without suites. All processes evaluate.
    """
    owner = paths.recipe.stages[0] if stage is None else paths.recipe.stage(stage)
    if not owner.evaluate.suites:
        return {}
    folder = paths.eval_dir(stage or "start")
    with lock_for_all(folder / ".lock", _busy(stage or "start")):
        point: _Point = decide(lambda: _look_up(paths, owner, stage, others))
        if point.metrics is not None:
            return point.metrics
        metrics = _evaluate(paths, owner, stage, point.model_key)
        done = {"key": point.key, "metrics": metrics}
        decide(lambda: write_sealed(folder / "manifest.json", {**done, "files": _files(folder, owner)}))
    return metrics


def _busy(point: str) -> str:
    return f"{point} is being evaluated by another command: wait for it."


@dataclass(frozen=True)
class _Point:
    """What the main process has found out of a point: the keys of its results and its model, and what is there."""

    key: str
    model_key: str
    metrics: dict[str, Any] | None


def _look_up(paths: RunPaths, owner: Stage, stage: str | None, others: Sequence[RunPaths]) -> _Point:
    point = stage or "start"
    folder = paths.eval_dir(point)
    identity = point_identity(paths, stage)
    key, model_key = _key(owner, identity), sha256_json(identity)
    if (done := _done(folder, owner, key)) is not None:
        say(f"{point}: evaluated already, skipped")
        return _Point(key, model_key, dict(done["metrics"]))
    for other in others:
        there = other.eval_dir(point)
        if (done := _done(there, owner, key)) is not None:
            for suite in owner.evaluate.suites:
                copy_folder(there / suite.name, folder / suite.name)
            write_sealed(folder / "manifest.json", done)
            say(f"{point}: evaluated already in {other.root}, taken over")
            return _Point(key, model_key, dict(done["metrics"]))
    return _Point(key, model_key, None)


def _done(folder: Path, owner: Stage, key: str) -> dict[str, Any] | None:
    """What an evaluation that is done with this key, and still as it was, says; else None."""
    done = read_sealed(folder / "manifest.json")
    same = done is not None and done.get("key") == key and done.get("files") == _files(folder, owner)
    return done if same else None


def _evaluate(paths: RunPaths, owner: Stage, stage: str | None, model_key: str) -> dict[str, Any]:
    from sft.evaluate.runner import evaluate
    from sft.models.load import on_device
    from sft.train.handover import load_stage_model

    point = stage or "start"
    model, tokenizer = together(lambda: load_stage_model(paths, stage))
    metrics = evaluate(
        on_device(model),
        tokenizer,
        owner.evaluate,
        prompt_defaults=asked_as(owner.data),
        out_dir=paths.eval_dir(point),
        point=point,
        model_key=model_key,
    )
    del model
    gc.collect()
    return dict(metrics)


def score_checkpoint(paths: RunPaths, stage: Stage, folder: Path, step: int) -> float:
    """pass@1 of the model in `folder`, which the stage had after `step`, on the suite that it keeps the best by.

    Answers are kept beside the stage's checkpoints, so that a killed comparison goes on.
    """
    from sft.evaluate.runner import evaluate
    from sft.models.load import on_device
    from sft.train.handover import default_dtype, load_final

    name = str(stage.keep_best).partition(".")[0]
    suites = [suite for suite in stage.evaluate.suites if suite.name == name]
    model, tokenizer = load_final(paths, folder, dtype=default_dtype(paths))
    metrics = evaluate(
        on_device(model),
        tokenizer,
        stage.evaluate.model_copy(update={"suites": suites}),
        prompt_defaults=asked_as(stage.data),
        out_dir=paths.stage_dir(stage.name) / "compared" / f"checkpoint-{step}",
        point=f"checkpoint-{step}",
        model_key=sha256_json(folder_hashes(folder)),
    )
    del model
    gc.collect()
    return float(metrics[name]["pass_at_1"])


def _key(owner: Stage, identity: dict[str, Any]) -> str:
    """What an evaluation's numbers follow from: the model, the suites with their problems, the templates."""
    from sft.data.read.sources import open_source
    from sft.evaluate.runner import VERSION

    return sha256_json(
        {
            "version": VERSION,
            "model": identity,
            "suites": owner.evaluate.model_dump(),
            "problems": [open_source(suite.source).identity for suite in owner.evaluate.suites],
            **asked_as(owner.data).model_dump(include={"prompt_template", "system_prompt"}),
        }
    )


def _files(folder: Path, owner: Stage) -> dict[str, Any]:
    """The results of the suites by content."""
    return {suite.name: folder_hashes(folder / suite.name) for suite in owner.evaluate.suites}


def evaluate_points(paths: RunPaths, *, start: bool = False, stage: str | None = None) -> dict[str, dict[str, Any]]:
    """Evaluate the start, or `stage`, or every stage that is trained; metrics by point and suite.

    Raises UserError when there is nothing to evaluate yet.
    """
    trained: list[str] = [] if start else decide(lambda: trained_stages(paths))
    points: list[str | None] = [None] if start else [stage] if stage else list(trained)
    ready = start or (stage in trained if stage else bool(trained))
    decide(lambda: check_recipe(paths.recipe, ("suites",), stage=stage, ask=ready))
    if not points:
        with alike():
            raise UserError(f"no stage is trained in {paths.root}; `sft run` trains, `--start` evaluates the start")
    if not start and stage is None and (missing := decide(lambda: untrained_stages(paths))):
        say(f"not trained yet, so not evaluated: {', '.join(missing)}")
    check_shared_folder(paths.root)
    return {point or "start": evaluate_point(paths, point) for point in points}


def evaluate_other(paths: RunPaths, name: str, stage: str | None) -> dict[str, dict[str, Any]]:
    """Suites of `stage` (default: the last one) on a model that isn't the run's; metrics by point and suite."""
    owner = paths.recipe.stage(stage) if stage else paths.recipe.stages[-1]
    decide(lambda: check_recipe(paths.recipe, ("suites",), stage=owner.name))
    if not owner.evaluate.suites:
        with alike():
            raise UserError(f"stage {owner.name} has no suites to evaluate a model on; --stage NAME takes another's")
    from sft.evaluate.runner import evaluate, model_fingerprint
    from sft.run.named import load_named

    check_shared_folder(paths.root)
    model, tokenizer = together(lambda: load_named(name, paths.recipe.model.trust_remote_code))
    key, point = decide(lambda: ((found := model_fingerprint(model)), _point_of(paths, name, found)))
    folder, asked = paths.eval_dir(point), asked_as(owner.data)
    with lock_for_all(folder / ".lock", _busy(point)):
        decide(lambda: write_sealed(folder / "manifest.json", {"model": key}))
        metrics = evaluate(
            model, tokenizer, owner.evaluate, prompt_defaults=asked, out_dir=folder, point=point, model_key=key
        )
    return {point: dict(metrics)}


def _point_of(paths: RunPaths, name: str, key: str) -> str:
    """Where another model's results go: by its name, and by its content too where that name is another model's."""
    point = f"model-{Path(name).resolve().name if Path(name).exists() else name.replace('/', '--')}"
    folder = paths.eval_dir(point)
    mine = (read_sealed(folder / "manifest.json") or {}).get("model") == key
    return point if mine or not folder.exists() else f"{point}-{key[:12]}"
