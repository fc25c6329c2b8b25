"""Trackers that see a run as one: its stages are a group of runs with one axis of steps, each with its configuration.

So trackio, Weights & Biases and MLflow are told; other trackers are transformers' business, which makes of each stage a
run by itself. A stage that goes on from a checkpoint goes on in its tracker's run, too.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.callbacks import has_numbers
from sft.utils.files import write_text

STEP = "train/global_step"
FINISH = 120.0
"""Seconds that Weights & Biases has to send what is left; trackio gives itself 30."""


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
    """The tracker's environment variable that names a project; it wins over the recipe."""

    def __init__(self, tracked: Tracked) -> None:
        self._of = tracked
        self._is_open = False

    def begin(self, project: str, group: str, name: str, runs: dict[str, str]) -> str:
        """Begin the stage's run, or go on with it; its id.

        Args:
            project, group: what it belongs to, and the group's name; `name`: the run's.
            runs: stage -> id of those that go on; an entry "" is the tracker's own, and is kept.
        """
        raise NotImplementedError

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Tell numbers of a step of the whole run."""
        raise NotImplementedError

    def end(self) -> None:
        """The run is over, or stops."""
        raise NotImplementedError

    def open(self) -> None:
        """Open the stage's run, or the one that it goes on in."""
        of, content = self._of, kept_runs(self._of.kept)
        group = content.setdefault("group", f"{of.name}-{secrets.token_hex(2)}")
        runs = content.setdefault(self.name, {})
        if not of.goes_on:
            runs.pop(of.stage, None)
        with redirect_stdout(sys.stderr):
            project = os.environ.get(self.variable) or of.project
            runs[of.stage] = self.begin(project, group, f"{group}-{of.stage}", runs)
        self._is_open = True
        write_text(of.kept, json.dumps(content, indent=2) + "\n")

    def tell(self, logs: Mapping[str, Any], step: int) -> None:
        """Tell the numbers of a line of metrics.jsonl; `step` is the stage's."""
        from transformers.integrations.integration_utils import rewrite_logs

        if self._is_open:
            whole = self._of.before + step
            numbers = {key: value for key, value in rewrite_logs(logs).items() if isinstance(value, int | float)}
            self.log({**numbers, STEP: whole}, whole)

    def close(self) -> None:
        """Send what isn't sent yet."""
        if self._is_open:
            self._is_open = False
            with redirect_stdout(sys.stderr):
                self.end()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step."""
        self.open()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line of the log."""
        if logs and has_numbers(logs):
            self.tell(logs, state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """After the last step, or where a signal stops it."""
        self.close()


class Trackio(StageTracker):
    """Hugging Face's trackio: local, or in a Space."""

    name, variable = "trackio", "TRACKIO_PROJECT"

    def begin(self, project: str, group: str, name: str, runs: dict[str, str]) -> str:
        """trackio goes on with a run by its name, and takes its configuration anew."""
        import trackio

        of = self._of
        there: dict[str, Any] = (
            {"space_id": of.space, "bucket_id": of.bucket, "private": of.private} if of.space else {}
        )
        known = runs.get(of.stage)
        name, resume = known or name, "allow" if known else "never"
        trackio.init(project=project, name=name, group=group, resume=resume, config=dict(of.config), **there)
        return name

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """At that step."""
        import trackio

        trackio.log(numbers, step=step)

    def end(self) -> None:
        """It is sent by a thread of trackio's."""
        import trackio

        trackio.finish()


class Wandb(StageTracker):
    """Weights & Biases, with its files in the run's folder."""

    name, variable = "wandb", "WANDB_PROJECT"

    def begin(self, project: str, group: str, name: str, runs: dict[str, str]) -> str:
        """A run goes on by its id, which is made here, for it to be known without a network.

        What is shown goes by the run's steps: W&B's own count never goes back, as a stage may.
        """
        import wandb

        of = self._of
        own = {"id": runs.get(of.stage) or secrets.token_hex(4), "resume": "allow", "dir": str(of.kept.parent)}
        limits = wandb.Settings(finish_timeout=FINISH)
        self._run = wandb.init(project=project, group=group, name=name, settings=limits, **own)
        self._run.config.update(dict(of.config), allow_val_change=True)
        self._run.define_metric(STEP)
        self._run.define_metric("*", step_metric=STEP, step_sync=True)
        return str(self._run.id)

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """Without a step of W&B's."""
        self._run.log(numbers)

    def end(self) -> None:
        """When all is sent, or after FINISH; `wandb sync` sends the rest."""
        self._run.finish()


class Mlflow(StageTracker):
    """MLflow: the group is a run, and the stages are its children."""

    name, variable = "mlflow", "MLFLOW_EXPERIMENT_NAME"

    def begin(self, project: str, group: str, name: str, runs: dict[str, str]) -> str:
        """A run's configuration is told once: another value of a parameter is an error."""
        import mlflow
        from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH, MAX_PARAMS_TAGS_PER_BATCH

        of, experiment = self._of, mlflow.set_experiment(project).experiment_id
        if "" not in runs:
            client = mlflow.MlflowClient()
            runs[""] = client.create_run(experiment, run_name=group).info.run_id
            client.set_terminated(runs[""])
        known, tags = runs.get(of.stage), {MLFLOW_PARENT_RUN_ID: runs[""], "group": group, "stage": of.stage}
        begun = mlflow.start_run(known, experiment, run_name=name, tags=tags)
        told = [] if known else [(_name(key), str(value)[:MAX_PARAM_VAL_LENGTH]) for key, value in of.config.items()]
        for first in range(0, len(told), MAX_PARAMS_TAGS_PER_BATCH):
            mlflow.log_params(dict(told[first : first + MAX_PARAMS_TAGS_PER_BATCH]))
        return str(begun.info.run_id)

    def log(self, numbers: dict[str, Any], step: int) -> None:
        """At that step."""
        import mlflow

        mlflow.log_metrics({_name(key): value for key, value in numbers.items()}, step=step)

    def end(self) -> None:
        """As finished."""
        import mlflow

        mlflow.end_run()


def _name(key: str) -> str:
    """MLflow takes few characters in names."""
    return re.sub(r"[^0-9A-Za-z_\-. :/]", "_", key)


TRACKERS: dict[str, type[StageTracker]] = {one.name: one for one in (Trackio, Wandb, Mlflow)}
"""Those that take stages as a group, by what `report_to` calls them."""


def wanted_trackers(report_to: str | list[str]) -> list[str]:
    """The trackers besides TensorBoard, which is always written, by a callback of ours."""
    names = [report_to] if isinstance(report_to, str) else report_to
    if "all" in names:
        from transformers.integrations import get_available_reporting_integrations

        names = get_available_reporting_integrations()
    return [name for name in dict.fromkeys(names) if name not in ("none", "tensorboard")]


def kept_runs(path: Path) -> dict[str, Any]:
    """The file with what trackers call the run, and the ids of its runs there; empty before they were told of it."""
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content
