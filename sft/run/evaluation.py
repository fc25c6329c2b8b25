"""Evaluations: of a run's start or a stage's model, and of any other model on a stage's suites or without a recipe."""

from __future__ import annotations

import gc
import glob
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe.asked import asked_as
from sft.recipe.suites import Chosen
from sft.run.checks import check_recipe, check_suites
from sft.run.identity import point_identity, trained_stages, untrained_stages
from sft.run.lock import lock_for_all
from sft.run.sharing import copy_folder
from sft.train.answering import answering_precision, begin_answering
from sft.utils.distributed import alike, check_shared_folder, decide, is_main, together, world_size
from sft.utils.errors import UserError
from sft.utils.files import read_sealed, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import EvaluateSection, Stage, SuiteSection

ALONE = Path("runs/eval")
"""Where answers go that no recipe has asked for."""


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
        metrics = _evaluate(paths, owner, stage, point.dtype)
        done = {"key": point.key, "dtype": point.dtype, "metrics": metrics}
        decide(lambda: write_sealed(folder / "manifest.json", {**done, "files": _files(folder, owner)}))
        if stage is not None and is_main():
            _tell_trackers(paths, stage, metrics)
    return metrics


def _tell_trackers(paths: RunPaths, stage: str, metrics: Mapping[str, Any]) -> None:
    if paths.trackers.is_file():  # where none was told of the training, nothing is imported for them
        from sft.train.track import track_results

        track_results(paths, stage, metrics)


def _busy(point: object) -> str:
    return f"{point} is being evaluated by another command: wait for it."


@dataclass(frozen=True)
class _Point:
    """What the main process has found out of a point: the type it answers in, its results' key, and what is there."""

    dtype: str
    key: str
    metrics: dict[str, Any] | None = None


def _look_up(paths: RunPaths, owner: Stage, stage: str | None, others: Sequence[RunPaths]) -> _Point:
    point = stage or "start"
    folder = paths.eval_dir(point)
    identity = point_identity(paths, stage)
    dtype = answering_precision(paths, owner.evaluate).dtype
    key = _key(owner, identity, dtype)
    if (done := _done(folder, owner, key)) is not None:
        say(f"{point}: evaluated already, skipped")
        return _Point(dtype, key, dict(done["metrics"]))
    for other in others:
        there = other.eval_dir(point)
        if (done := _done(there, owner, key)) is not None:
            for suite in owner.evaluate.suites:
                copy_folder(there / suite.name, folder / suite.name)
            begin_answering(paths, owner.evaluate)
            write_sealed(folder / "manifest.json", done)
            say(f"{point}: evaluated already in {other.root}, taken over")
            return _Point(dtype, key, dict(done["metrics"]))
    if stage is not None:
        steps = (read_sealed(paths.stage_manifest(stage)) or {})["steps"]
        _take_from_training(paths.step_dir(stage, steps), folder, owner.evaluate.suites)
    begin_answering(paths, owner.evaluate, point)
    return _Point(dtype, key)


def _take_from_training(source: Path, target: Path, suites: Sequence[SuiteSection]) -> None:
    """Put what a stage's model answered while it was trained where nothing is yet.

    Whether it is what this model would answer follows from its key, as ever: if not, it is made anew.
    """
    for suite in suites:
        made, here = source / suite.name, target / suite.name
        metrics = read_sealed(made / "metrics.json")
        if metrics is not None and not here.exists():
            copy_folder(made, here)
            write_sealed(here / "metrics.json", {**metrics, "point": target.name})


def _done(folder: Path, owner: Stage, key: str) -> dict[str, Any] | None:
    """What an evaluation that is done with this key, and still as it was, says; else None. A check of its answers had
    as much time as it has now."""
    done = read_sealed(folder / "manifest.json")
    if done is None or done.get("key") != key or done.get("files") != _files(folder, owner):
        return None
    times = {metrics["settings"]["verify_timeout"] for metrics in done["metrics"].values()}
    return done if times == {owner.evaluate.verify_timeout} else None


def _evaluate(
    paths: RunPaths, owner: Stage, stage: str | None, dtype: str, chosen: Chosen | None = None
) -> dict[str, Any]:
    from sft.evaluate.runner import evaluate
    from sft.models.load import on_device
    from sft.train.handover import load_stage_model

    chosen = chosen or Chosen()
    point = f"{stage or 'start'}{chosen.label}"
    model, tokenizer = together(lambda: load_stage_model(paths, stage, dtype=dtype))
    metrics = evaluate(
        on_device(model),
        tokenizer,
        chosen.of(owner.evaluate),
        prompt_defaults=asked_as(owner.data),
        out_dir=paths.eval_dir(point),
        point=point,
    )
    del model
    gc.collect()
    return dict(metrics)


def score_checkpoint(paths: RunPaths, stage: Stage, folder: Path, step: int) -> float:
    """pass@1 of the model in `folder`, which the stage had after `step`, on the suite that it keeps the best by.

    All processes answer. Answers are kept beside the stage's checkpoints, so that a killed comparison goes on.
    """
    from sft.evaluate.runner import evaluate
    from sft.models.load import on_device
    from sft.train.handover import load_answering

    name = str(stage.keep_best).partition(".")[0]
    suites = [suite for suite in stage.evaluate.suites if suite.name == name]
    out = paths.stage_dir(stage.name) / "compared" / f"checkpoint-{step}"
    decide(lambda: _take_from_training(paths.step_dir(stage.name, step), out, suites))
    dtype = decide(lambda: begin_answering(paths, stage.evaluate)).dtype
    model, tokenizer = together(lambda: load_answering(paths, folder, dtype))
    metrics = evaluate(
        on_device(model),
        tokenizer,
        stage.evaluate.model_copy(update={"suites": suites}),
        prompt_defaults=asked_as(stage.data),
        out_dir=out,
        point=out.name,
    )
    del model
    gc.collect()
    return float(metrics[name]["pass_at_1"])


def read_live_problems(stage: Stage) -> None:
    """Raise UserError for problems that `evaluate.every` couldn't ask later on."""
    from sft.evaluate.suites import load_problems

    for suite in stage.evaluate.while_training():
        load_problems(suite)


def evaluate_live(
    paths: RunPaths, stage: Stage, answering: tuple[Any, Any], step: int, check: Callable[[], None]
) -> dict[str, dict[str, Any]]:
    """What `evaluate.every` asks of the model of a stage that is training, after `step`; metrics by suite.

    All processes evaluate. The answers are known by the weights' content: where they are there, they are looked up.

    Args:
        answering: the model and its tokenizer.
        check: called after each sample; what it raises ends the evaluation, and what is answered is kept.
    """
    from sft.evaluate.progress import SuiteLines
    from sft.evaluate.runner import evaluate

    model, tokenizer = answering
    suites, point = stage.evaluate.while_training(), f"{stage.name}-step-{step}"
    lines = SuiteLines(point, suites, processes=world_size()) if is_main() else None

    def progress(suite: str, done: int, total: int, right: int) -> None:
        check()
        if lines is not None:
            lines(suite, done, total, right)

    return evaluate(
        model,
        tokenizer,
        stage.evaluate.model_copy(update={"suites": suites}),
        prompt_defaults=asked_as(stage.data),
        out_dir=paths.step_dir(stage.name, step),
        point=point,
        progress=progress,
    )


def _key(owner: Stage, identity: dict[str, Any], dtype: str) -> str:
    """What an evaluation's answers follow from: the model and its type, the suites with their problems, the
    templates."""
    from sft.data.read.sources import open_source
    from sft.evaluate.runner import VERSION

    return sha256_json(
        {
            "version": VERSION,
            "model": identity,
            "dtype": dtype,
            "suites": owner.evaluate.model_dump(include={"suites"}),
            "problems": [open_source(suite.source).identity for suite in owner.evaluate.suites],
            **asked_as(owner.data).model_dump(include={"prompt_template", "system_prompt"}),
        }
    )


def _files(folder: Path, owner: Stage) -> dict[str, Any]:
    """The results of the suites by content."""
    return {suite.name: folder_hashes(folder / suite.name) for suite in owner.evaluate.suites}


def evaluate_points(
    paths: RunPaths, *, start: bool = False, stage: str | None = None, chosen: Chosen | None = None
) -> dict[str, dict[str, Any]]:
    """Evaluate the start, or `stage`, or every stage that is trained; metrics by point and suite.

    `chosen`: suites, problems and samples other than the recipe's. Raises UserError when there is nothing to evaluate
    yet.
    """
    trained: list[str] = [] if start else decide(lambda: trained_stages(paths))
    points: list[str | None] = [None] if start else [stage] if stage else list(trained)
    ready = start or (stage in trained if stage else bool(trained))
    decide(lambda: check_recipe(paths.recipe, () if chosen else ("suites",), stage=stage, ask=ready))
    if not points:
        with alike():
            raise UserError(f"no stage is trained in {paths.root}; `sft run` trains, `--start` evaluates the start")
    if not start and stage is None and (missing := decide(lambda: untrained_stages(paths))):
        say(f"not trained yet, so not evaluated: {', '.join(missing)}")
    check_shared_folder(paths.root)
    if not chosen:
        return {point or "start": evaluate_point(paths, point) for point in points}
    return {f"{point or 'start'}{chosen.label}": _evaluate_chosen(paths, point, chosen) for point in points}


def _evaluate_chosen(paths: RunPaths, stage: str | None, chosen: Chosen) -> dict[str, Any]:
    """Suites that aren't just the recipe's; what is done is looked up suite by suite."""
    owner = paths.recipe.stages[0] if stage is None else paths.recipe.stage(stage)
    point = f"{stage or 'start'}{chosen.label}"
    section = decide(lambda: chosen.of(owner.evaluate))
    if not section.suites:
        return {}
    decide(lambda: check_suites(section))
    with lock_for_all(paths.eval_dir(point) / ".lock", _busy(point)):
        dtype = decide(lambda: begin_answering(paths, owner.evaluate, point)).dtype
        return _evaluate(paths, owner, stage, dtype, chosen)


def evaluate_other(
    paths: RunPaths, name: str, stage: str | None, chosen: Chosen | None = None
) -> dict[str, dict[str, Any]]:
    """Suites of `stage` (default: the last one), or `chosen` ones, on a model that isn't the run's; metrics by point
    and suite."""
    owner, asked_for = paths.recipe.stage(stage) if stage else paths.recipe.stages[-1], chosen or Chosen()
    section = decide(lambda: asked_for.of(owner.evaluate))
    decide(lambda: check_recipe(paths.recipe, () if chosen else ("suites",), stage=owner.name))
    if not section.suites:
        with alike():
            raise UserError(f"stage {owner.name} has no suites to evaluate a model on; --stage NAME takes another's")
    decide(lambda: check_suites(section))
    from sft.evaluate.runner import evaluate
    from sft.run.named import load_named

    check_shared_folder(paths.root)
    free, trust = paths.eval_dir(f"model-{_called(name)}"), paths.recipe.model.trust_remote_code
    dtype = decide(lambda: _dtype_of(name, section, _namesakes(free)))
    model, tokenizer = together(lambda: load_named(name, trust, dtype=dtype))
    key, folder = decide(lambda: _key_and_folder(model, free.with_name(f"{free.name}{asked_for.label}")))
    point, asked = folder.name, asked_as(owner.data)
    with lock_for_all(folder / ".lock", _busy(point)):
        decide(lambda: write_sealed(folder / "manifest.json", _noted(name, model, key)))
        metrics = evaluate(model, tokenizer, section, prompt_defaults=asked, out_dir=folder, point=point, model_key=key)
    return {point: dict(metrics)}


def evaluate_alone(
    name: str,
    section: EvaluateSection,
    out_dir: Path | None = None,
    *,
    label: str = "",
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """Suites without a recipe on the model `name`; metrics by point and suite.

    `out_dir`: the folder of the results, by default `runs/eval/`, the model's name, and `label`, which says what of the
    suites is asked. Raises UserError where it holds answers of another model, in another type, or of one of these
    suites with other settings.
    """
    decide(lambda: check_suites(section))
    if out_dir is not None:
        decide(lambda: _check_settings(out_dir, section))
    from sft.evaluate.runner import evaluate
    from sft.run.named import load_named

    usual = ALONE / _called(name)
    dtype = decide(lambda: _dtype_of(name, section, [out_dir] if out_dir else _namesakes(usual)))
    model, tokenizer = together(lambda: load_named(name, trust_remote_code, dtype=dtype))
    key, free = decide(lambda: _key_and_folder(model, usual.with_name(f"{usual.name}{label}")))
    folder = out_dir or free
    check_shared_folder(folder)
    with lock_for_all(folder / ".lock", _busy(folder)):
        decide(lambda: _claim(folder, section, _noted(name, model, key)))
        metrics = evaluate(
            model, tokenizer, section, prompt_defaults=None, out_dir=folder, point=folder.name, model_key=key
        )
    return {folder.name: dict(metrics)}


def _dtype_of(name: str, section: EvaluateSection, folders: Iterable[Path]) -> str | None:
    """What a model that is named answers in: what is said, else what its answers in `folders` began with, on whatever
    machine; None: neither."""
    if section.bf16 is not None:
        return "bfloat16" if section.bf16 else "float32"
    notes = [read_sealed(folder / "manifest.json") or {} for folder in folders]
    return next((note["dtype"] for note in notes if note.get("name") == name and "dtype" in note), None)


def _namesakes(folder: Path) -> list[Path]:
    """The folders of all models that are called as this one's says."""
    return [folder, *sorted(folder.parent.glob(f"{glob.escape(folder.name)}-*"))]


def _noted(name: str, model: Any, key: str) -> dict[str, Any]:
    """Whose answers are in a folder, and what they are given in."""
    return {"model": key, "name": name, "dtype": str(model.dtype).removeprefix("torch.")}


def _claim(folder: Path, section: EvaluateSection, note: dict[str, Any]) -> None:
    """Note whose answers will be in `folder`. Raises UserError where those of another model, or to other settings, are
    there."""
    there = _check_settings(folder, section)
    if there.get("model", note["model"]) != note["model"]:
        named, dtype = there.get("name"), there.get("dtype", note["dtype"])
        other = (
            f"this model in {dtype}" if dtype != note["dtype"] and named == note["name"] else f"another model, {named}"
        )
        raise UserError(f"{folder} holds answers of {other}: name another --output_dir")
    suites = {**there.get("suites", {}), **{suite.name: _settings(suite) for suite in section.suites}}
    write_sealed(folder / "manifest.json", {**note, "suites": suites})


def _check_settings(folder: Path, section: EvaluateSection) -> dict[str, Any]:
    """What is recorded of the answers in `folder`. Raises UserError for a suite with other settings: its answers would
    be lost."""
    there = read_sealed(folder / "manifest.json") or {}
    for suite in section.suites:
        before, now = there.get("suites", {}).get(suite.name), _settings(suite)
        if before not in (None, now) and (folder / suite.name / "samples.jsonl").is_file():
            changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
            raise UserError(
                f"{folder / suite.name} holds answers with another {', '.join(changed)}: name another --output_dir, or "
                "remove that folder"
            )
    return there


def _settings(suite: SuiteSection) -> dict[str, Any]:
    """A suite's keys that answers follow from."""
    return suite.model_dump(exclude={"batch_size"})


def _called(name: str) -> str:
    """A model's name as a folder's."""
    return Path(name).resolve().name if Path(name).exists() else name.replace("/", "--")


def _key_and_folder(model: Any, folder: Path) -> tuple[str, Path]:
    """What identifies a model, and where its results go: by its name, and by its content too where that name is another
    model's."""
    from sft.evaluate.runner import model_fingerprint

    key = model_fingerprint(model)
    mine = (read_sealed(folder / "manifest.json") or {}).get("model") == key
    return key, folder if mine or not folder.exists() else folder.with_name(f"{folder.name}-{key[:12]}")
