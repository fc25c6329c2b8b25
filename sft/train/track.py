"""Whom `report_to` names is told of a stage: its numbers while it trains, its settings, and its results at the end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sft.train.evaluations import as_logged
from sft.train.telling import Unfailing
from sft.train.trackers import TRACKERS, Tracked, kept_runs, wanted_trackers
from sft.utils.distributed import is_main
from sft.utils.errors import first_line
from sft.utils.files import read_sealed
from sft.utils.say import say
from sft.utils.secrets import published, to_look_for

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Recipe, Stage
    from sft.train.job import Job

COUNTS = ("funnel", "documents", "packs", "tokens", "supervised_tokens")
"""Of what was prepared."""


def track(job: Job, data: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    """Have trackers told of a stage: its numbers, its settings, what became of its rows (`data`: the manifest of what
    was prepared), and what it runs on."""
    names = _grouping(job.stage)
    if names and is_main():
        tracked = _tracked(job.paths, job.stage, data, runs, goes_on=job.checkpoint is not None)
        job.trainer.callback_handler.callbacks += [Unfailing(TRACKERS[name](tracked)) for name in names]


def track_results(paths: RunPaths, name: str, metrics: Mapping[str, Mapping[str, Any]]) -> None:
    """Tell those who were told of the training of stage `name` what its model answers in the end: metrics by suite."""
    stage, manifest = paths.recipe.stage(name), read_sealed(paths.stage_manifest(name))
    asked = _grouping(stage)
    if not asked or manifest is None:
        return
    runs = {key: manifest[key] for key in ("engine", "zero_stage", "world_size", "sequence_parallel_size", "kernels")}
    tracked = _tracked(paths, stage, manifest["data"], runs, goes_on=True)
    for one in asked:
        try:
            if name in kept_runs(paths.trackers).get(one, {}):
                tracker = TRACKERS[one](tracked)
                tracker.open()
                tracker.tell(as_logged(metrics), manifest["steps"])
                tracker.close()
        except Exception as error:
            say(f"{one} can't be told of the results of {name} ({first_line(error)})")


def _grouping(stage: Stage) -> list[str]:
    """Whom `report_to` names of those that take stages as a group."""
    return [name for name in wanted_trackers(stage.train.report_to) if name in TRACKERS]


def _tracked(
    paths: RunPaths, stage: Stage, data: Mapping[str, Any], runs: Mapping[str, Any], *, goes_on: bool
) -> Tracked:
    recipe, train, stages = paths.recipe, stage.train, [one.name for one in paths.recipe.stages]
    manifests = [read_sealed(paths.stage_manifest(name)) or {} for name in stages[: stages.index(stage.name)]]
    return Tracked(
        stage=stage.name,
        name=train.run_name or recipe.name,
        kept=paths.trackers,
        goes_on=goes_on,
        before=sum(manifest.get("steps", 0) for manifest in manifests),
        config=_config(recipe, stage, data, runs),
        project=train.project,
        space=train.trackio_space_id,
        bucket=train.trackio_bucket_id,
        private=recipe.push.private,
    )


def _config(recipe: Recipe, stage: Stage, data: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings and counts, as they may be shown to anybody."""
    given = recipe.model_dump(mode="json")
    prepared = {key: data[key] for key in COUNTS if key in data}
    own = stage.model_dump(mode="json", exclude={"name"})
    settings = {"stage": stage.name, "model": given["model"], **own, "prepared": prepared, "runs": dict(runs)}
    return dict(flat(published(settings, to_look_for(given))))


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names and plain values; a list is told as JSON, and what isn't set isn't told."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from flat(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, json.dumps(value, ensure_ascii=False, default=str)
    elif value is not None:
        yield name, value
