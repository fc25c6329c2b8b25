"""Where a run keeps what: the one place that knows the names of its files and folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sft.recipe.schema import Recipe


@dataclass(frozen=True)
class RunPaths:
    """Paths of one run, all below the recipe's `output_dir` (but for a `prepared_dir` set by the recipe)."""

    recipe: Recipe

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.recipe.output_dir)

    @property
    def resolved(self) -> Path:
        """The recipe with everything filled in."""
        return self.root / "resolved.yaml"

    @property
    def given(self) -> Path:
        """The recipe as it was given, before anything was filled in."""
        return self.root / "recipe.yaml"

    @property
    def dry_run(self) -> Path:
        """What `--dry_run` writes: a recipe that nothing has been made with."""
        return self.root / "resolved.dry_run.yaml"

    @property
    def manifest(self) -> Path:
        """The run's manifest: versions, commit, seeds, hashes, counts, results."""
        return self.root / "manifest.json"

    @property
    def restart(self) -> Path:
        """Which stage was asked to be done again, with which recipe; gone once that is done."""
        return self.root / "restart.json"

    @property
    def alerts(self) -> Path:
        """One JSON line for each thing that somebody should look at."""
        return self.root / "alerts.jsonl"

    @property
    def trackers(self) -> Path:
        """What trackers call the run, and the ids of its stages' runs there."""
        return self.root / "trackers.json"

    @property
    def prepared(self) -> Path:
        """The store of prepared data, a folder per content key."""
        return Path(self.recipe.prepared_dir) if self.recipe.prepared_dir else self.root / "prepared"

    @property
    def report(self) -> Path:
        """The folder of the report; its page is `index.html`."""
        return self.root / "report"

    @property
    def export(self) -> Path:
        """The folder that is pushed to the Hub."""
        return self.root / "export"

    def stage_dir(self, stage: str) -> Path:
        """Everything a stage's training makes."""
        return self.root / "stages" / stage

    def final_dir(self, stage: str) -> Path:
        """The model that a stage hands on: config, weights or adapter, tokenizer."""
        return self.stage_dir(stage) / "final"

    def metrics(self, stage: str) -> Path:
        """One JSON line per logging step."""
        return self.stage_dir(stage) / "metrics.jsonl"

    def events(self, stage: str) -> Path:
        """One JSON line per checkpoint that was written, and per start that went on from one."""
        return self.stage_dir(stage) / "events.jsonl"

    def tensorboard(self, stage: str) -> Path:
        """TensorBoard's event files."""
        return self.stage_dir(stage) / "tensorboard"

    def step_dir(self, stage: str, step: int) -> Path:
        """What a stage's model answered after a step, while it was trained: a folder for each suite."""
        return self.stage_dir(stage) / "evaluations" / f"step-{step}"

    def stage_manifest(self, stage: str) -> Path:
        """Written last: a stage with a manifest of the right key is done."""
        return self.stage_dir(stage) / "manifest.json"

    @property
    def answering(self) -> Path:
        """What type this run's models answer in, where the recipe doesn't say it."""
        return self.root / "eval" / "answering.json"

    def eval_dir(self, point: str, suite: str | None = None) -> Path:
        """Results at `point` (`start` or a stage's name), of one suite or of all."""
        folder = self.root / "eval" / point
        return folder / suite if suite else folder
