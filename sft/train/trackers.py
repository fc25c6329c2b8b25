"""Trackers that see a run as one: its stages are a group of runs with one axis of steps, each with its configuration.

Accelerate opens, feeds and closes trackio, Weights & Biases and MLflow; other trackers are transformers' own business,
which makes of each stage a run by itself. A stage that goes on from a checkpoint goes on in its tracker's run, too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.recipe.published import secrets_of
from sft.train.callbacks import has_numbers
from sft.utils.distributed import is_main
from sft.utils.files import read_sealed, write_text
from sft.utils.secrets import published

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

    from sft.recipe.schema import Recipe, Stage
    from sft.train.job import Job

STEP = "train/global_step"


@dataclass(frozen=True)
class Tracked:
    """What trackers are told of a stage, and where their runs are kept.

    Attributes:
        stage: its name.
        name: what the group is called, but for a word that tells it from others of the name.
        kept: the file with the group's name and the ids of its runs.
        goes_on: whether the stage goes on from a checkpoint.
        before: optimizer steps of the stages before it.
        config: name -> value, flat.
        project: what the group belongs to, where the tracker's own variable doesn't say it.
        space, bucket, private: where trackio shows the project on the Hub, and to whom.
    """

    stage: str
    name: str
    kept: Path
    goes_on: bool
    before: int
    config: Mapping[str, Any]
    project: str
    space: str | None = None
    bucket: str | None = None
    private: bool = True


class StageTracker(TrainerCallback):
    """One tracker of one stage; on the main process alone."""

    name: str
    variable: str
    """The environment variable that names a project, whatever the recipe says, as Accelerate has it for MLflow."""
    told_again = True
    """Whether a run that goes on is told its configuration again."""

    def __init__(self, tracked: Tracked) -> None:
        self._of = tracked
        self._tracker: GeneralTracker | None = None
        self._group = ""
        self._runs: dict[str, str] = {}

    def settings(self, project: str, run: str | None) -> dict[str, Any]:
        """What the tracker is opened with; `run`: the id of the run that goes on."""
        raise NotImplementedError

    def opened(self, tracker: Any) -> str:
        """The id to go on with later."""
        raise NotImplementedError

    def named(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """Numbers, or a configuration, under names that the tracker takes."""
        return numbers

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the stage's run, or the one that it goes on in."""
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        of = self._of
        project = os.environ.get(self.variable) or of.project
        content = json.loads(of.kept.read_text(encoding="utf-8")) if of.kept.is_file() else {}
        self._group = content.setdefault("group", f"{of.name}-{secrets.token_hex(2)}")
        self._runs = content.setdefault(self.name, {})
        run = self._runs.get(of.stage) if of.goes_on else None
        with redirect_stdout(sys.stderr):
            tracker = LOGGER_TYPE_TO_CLASS[self.name](project, **self.settings(project, run))
            tracker.start()
            if run is None or self.told_again:
                tracker.store_init_configuration(self.named(dict(of.config)))
        self._runs[of.stage] = self.opened(tracker.tracker)
        write_text(of.kept, json.dumps(content, indent=2) + "\n")
        self._tracker = tracker

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Tell a line of metrics.jsonl, at the step of the whole run."""
        from transformers.integrations.integration_utils import rewrite_logs

        if self._tracker is None or not logs or not has_numbers(logs):
            return
        step = self._of.before + state.global_step
        numbers = {key: value for key, value in rewrite_logs(logs).items() if isinstance(value, int | float)}
        self.tell(self._tracker, {**self.named(numbers), STEP: step}, step)

    def tell(self, tracker: GeneralTracker, numbers: dict[str, Any], step: int) -> None:
        """Hand numbers of a step over."""
        tracker.log(numbers, step=step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close it."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            with redirect_stdout(sys.stderr):
                self.close(tracker)

    def close(self, tracker: GeneralTracker) -> None:
        """The stage's run is over, or stops."""
        tracker.finish()


class Trackio(StageTracker):
    """Hugging Face's trackio: local, or in a Space."""

    name, variable = "trackio", "TRACKIO_PROJECT"

    def settings(self, project: str, run: str | None) -> dict[str, Any]:
        """trackio goes on with a run by its name."""
        of = self._of
        there = {"space_id": of.space, "bucket_id": of.bucket, "private": of.private} if of.space else {}
        name = run or f"{self._group}-{of.stage}"
        return {"name": name, "group": self._group, "resume": "allow" if run else "never", **there}

    def opened(self, tracker: Any) -> str:
        """Its name."""
        return str(tracker.name)

    def close(self, tracker: GeneralTracker) -> None:
        """By trackio itself, which would do it once more when the process ends."""
        import trackio

        trackio.finish()


class Wandb(StageTracker):
    """Weights & Biases, with its files in the run's folder."""

    name, variable = "wandb", "WANDB_PROJECT"

    def settings(self, project: str, run: str | None) -> dict[str, Any]:
        """A run goes on by its id, which is made here, for it to be known without a network."""
        of = self._of
        name = f"{self._group}-{of.stage}"
        own = {"id": run or secrets.token_hex(4), "resume": "allow", "dir": str(of.kept.parent)}
        return {"name": name, "group": self._group, **own}

    def opened(self, tracker: Any) -> str:
        """Its id. What is shown goes by the run's steps: W&B's own count never goes back, as a stage may."""
        tracker.define_metric(STEP)
        tracker.define_metric("*", step_metric=STEP, step_sync=True)
        return str(tracker.id)

    def tell(self, tracker: GeneralTracker, numbers: dict[str, Any], step: int) -> None:
        """Without a step of W&B's."""
        tracker.log(numbers)


class Mlflow(StageTracker):
    """MLflow: the group is a run, and the stages are its children."""

    name, variable = "mlflow", "MLFLOW_EXPERIMENT_NAME"
    told_again = False  # another value of a parameter is an error there

    def settings(self, project: str, run: str | None) -> dict[str, Any]:
        """Children of the group's run."""
        import mlflow
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

        of = self._of
        experiment = mlflow.set_experiment(project)
        if "" not in self._runs:
            client = mlflow.MlflowClient()
            parent = client.create_run(experiment.experiment_id, run_name=self._group).info.run_id
            client.set_terminated(parent)
            self._runs[""] = parent
        tags = {MLFLOW_PARENT_RUN_ID: self._runs[""], "group": self._group, "stage": of.stage}
        return {"run_id": run, "run_name": f"{self._group}-{of.stage}", "tags": tags}

    def opened(self, tracker: Any) -> str:
        """Its id."""
        return str(tracker.info.run_id)

    def named(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """MLflow takes few characters in names."""
        return {re.sub(r"[^0-9A-Za-z_\-. :/]", "_", key): value for key, value in numbers.items()}


TRACKERS: dict[str, type[StageTracker]] = {one.name: one for one in (Trackio, Wandb, Mlflow)}
"""Those that take stages as a group, by what `report_to` calls them."""


def wanted_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers besides TensorBoard, which is always written, by a callback of ours."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if "all" in names:
        from transformers.integrations import get_available_reporting_integrations

        names = get_available_reporting_integrations()
    return [name for name in dict.fromkeys(names) if name not in ("none", "tensorboard")]


def flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted names and plain values; a list is told as JSON, and what isn't set isn't told."""
    if isinstance(value, Mapping):
        for key, child in value.items():
            yield from flat(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        yield name, json.dumps(value, ensure_ascii=False, default=str)
    elif value is not None:
        yield name, value


def track(job: Job, data: Mapping[str, Any], runs: Mapping[str, Any]) -> None:
    """Have trackers told of a stage: its numbers, its settings, what became of its rows (`data`: the manifest of what
    was prepared), and what it runs on."""
    from sft.train.telling import Unfailing

    stage, recipe, train = job.stage, job.paths.recipe, job.stage.train
    names = [name for name in wanted_trackers(train.report_to) if name in TRACKERS]
    if not names or not is_main():
        return
    stages = [one.name for one in recipe.stages]
    manifests = [read_sealed(job.paths.stage_manifest(name)) or {} for name in stages[: stages.index(stage.name)]]
    tracked = Tracked(
        stage=stage.name,
        name=train.run_name or recipe.name,
        kept=job.paths.trackers,
        goes_on=job.checkpoint is not None,
        before=sum(manifest.get("steps", 0) for manifest in manifests),
        config=_config(recipe, stage, data, runs),
        project=train.project,
        space=train.trackio_space_id,
        bucket=train.trackio_bucket_id,
        private=recipe.push.private,
    )
    job.trainer.callback_handler.callbacks += [Unfailing(TRACKERS[name](tracked)) for name in names]


def _config(recipe: Recipe, stage: Stage, data: Mapping[str, Any], runs: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's settings and counts, as they may be shown to anybody."""
    given = recipe.model_dump(mode="json")
    prepared = {
        key: data[key] for key in ("funnel", "documents", "packs", "tokens", "supervised_tokens") if key in data
    }
    own = stage.model_dump(mode="json", exclude={"name"})
    settings = {"stage": stage.name, "model": given["model"], **own, "prepared": prepared, "runs": dict(runs)}
    return dict(flat(published(settings, secrets_of(given, "", ()))))
