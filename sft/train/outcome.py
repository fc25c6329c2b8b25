"""What a stage hands on in place of its last step's weights: which checkpoints are averaged, and with what."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.average import WEIGHT_FILES, Average
from sft.recipe.outcome_keys import (
    AverageSection,
    begins,
    scheduled,
    unreached,
    unsaved,
    without_choice,
    without_end,
)
from sft.recipe.problems import refuse
from sft.train.checkpoints import MARKER, describe_difference, remove
from sft.train.ema import FILE
from sft.utils.distributed import decide
from sft.utils.errors import UserError
from sft.utils.files import atomic_folder, read_sealed, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import Stage

MADE_FROM = "made_from.json"


@dataclass(frozen=True)
class Outcome:
    """What a stage's recipe says of its result, in the folder of its checkpoints, which are of the training `identity`.

    `max_steps`, `steps_of_an_epoch`: of the whole stage.
    """

    stage: Stage
    folder: Path
    identity: Mapping[str, Any]
    max_steps: int
    steps_of_an_epoch: int
    parents: list[dict[str, Any]] = field(default_factory=list)

    def check(self, begun: int) -> None:
        """Raise UserError when weights are asked for that the stage won't have, or, up to step `begun`, where it goes
        on, hasn't, or when what chooses among them or ends the stage has no effect; before it does a step."""
        saved = self._scheduled(self.max_steps)
        place, stage = f"stages[{self.stage.name}]", self.stage
        found = [*unsaved(stage, saved), *unreached(stage, self.max_steps)]
        found += [*without_choice(stage, saved), *without_end(stage, self.max_steps)]
        refuse(found, lambda loc: f"{place}.{'.'.join(map(str, loc))}")
        # As needed at the end of a stage that does all its steps.
        needed = self.candidates if stage.keep_best else self.wanted
        for step in sorted(needed(self.max_steps)):
            if step <= begun and read_sealed(self.folder / f"checkpoint-{step}" / MARKER) is None:
                raise self._missing(step)

    def wanted(self, step: int) -> set[int]:
        """The steps, up to `step`, whose checkpoints have to be kept as far as can be told then."""
        average, limit = self.stage.average, self.stage.train.save_total_limit
        if average is not None and average.checkpoints:
            return set(average.steps())
        newest = limit if self.stage.keep_best else average.last if average is not None else None
        return set(self.saved(step)[-newest:]) if newest else set()

    def saved(self, step: int) -> list[int]:
        """The steps, up to `step`, whose checkpoints the recipe asks for; what a signal had saved is none of these."""
        return [found for found in self._scheduled(self.max_steps) if found <= step]

    def candidates(self, end: int) -> list[int]:
        """The steps whose checkpoints `keep_best` chooses from, for a stage that has ended at `end`."""
        kept, limit = self._scheduled(end), self.stage.train.save_total_limit
        return kept if limit is None else kept[-limit:]

    def average(self, end: int) -> Average | None:
        """What is averaged, for a stage that has ended at step `end`; `parents` then tell it by content.

        Raises UserError when a checkpoint isn't there any more, or isn't of this training.
        """
        asked = self.stage.average or (AverageSection(ema=True) if self.stage.train.ema else None)
        if asked is None:
            return None
        ema = asked.ema and self._has_ema(end)
        if asked.ema and not ema and not asked.with_start:
            return None
        steps = asked.steps() or (self._scheduled(end)[-asked.last :] if asked.last else [])
        if asked.last and len(steps) < asked.last:
            say(f"{self.stage.name}: averages {len(steps)} checkpoints, of {asked.last} asked: it ended at step {end}")
        folders = [self.checkpoint(step) for step in steps]
        start = self.folder / "start" if asked.with_start else None
        share = asked.weight if asked.weight is not None else 1.0
        for folder in folders:
            self._tell(folder.name, share / len(folders), folder)
        if not folders:
            self._tell("ema" if ema else "trained", share, self.folder / f"checkpoint-{end}", ema)
        if start is not None:
            self._tell("start", round(1.0 - share, 12), start)
        return Average(folders, start, share) if folders or start is not None else None

    def best(self, end: int, score: Callable[[Average, int], float]) -> dict[str, Any]:
        """What `keep_best` comes to: the score of each candidate, and the step of the best, the earliest of several.

        On all processes; the main one looks at the checkpoints. `score`: what the suite says of an average, and of the
        step that it is of.
        """
        folders = {step: decide(partial(self.checkpoint, step)) for step in self.candidates(end)}
        scores = {step: score(Average([folder]), step) for step, folder in folders.items()}
        step = max(scores, key=lambda found: (scores[found], -found))
        decide(lambda: self._tell(f"checkpoint-{step}", 1.0, self.checkpoint(step)))
        return {"step": step, "scores": {f"checkpoint-{found}": value for found, value in scores.items()}}

    def checkpoint(self, step: int) -> Path:
        """The folder of a checkpoint of this training, whole. Raises UserError for any other."""
        folder = self.folder / f"checkpoint-{step}"
        marker = read_sealed(folder / MARKER)
        if marker is None:
            raise self._missing(step)
        if difference := describe_difference(marker["identity"], self.identity):
            raise UserError(f"{folder} is of another training than stage {self.stage.name}'s: {difference}.")
        for name, found in folder_hashes(folder, WEIGHT_FILES).items():
            if marker["files"].get(name) != found:
                raise UserError(f"{folder} is damaged ({name}), and can't be handed on.")
        return folder

    def _missing(self, step: int) -> UserError:
        folder = self.folder / f"checkpoint-{step}"
        return UserError(
            f"{folder}, which stage {self.stage.name} hands on a part of, isn't there or isn't whole: put save_steps "
            "and save_total_limit back as they were when it was begun, or leave out what asks for it (average, "
            "keep_best)."
        )

    def keep_start(self, model: Any) -> None:
        """Write the weights that the stage starts from where an average takes them in. On all processes."""
        if self.stage.average is not None and self.stage.average.with_start:
            decide(lambda: self._keep_start(model))

    def forget_start(self) -> None:
        """Remove them; a stage that is handed on anew writes them again."""
        if (self.folder / "start").exists():
            remove(self.folder / "start")

    def _keep_start(self, model: Any) -> None:
        from sft.models.save import save_model

        folder, source = self.folder / "start", sha256_json(dict(self.identity))
        note = read_sealed(folder / MADE_FROM)
        if note is None or note != {"source": source, "files": folder_hashes(folder, WEIGHT_FILES)}:
            with atomic_folder(folder) as made:
                save_model(made, model)
            write_sealed(folder / MADE_FROM, {"source": source, "files": folder_hashes(folder, WEIGHT_FILES)})

    def _tell(self, name: str, weight: float, folder: Path, ema: bool = False) -> None:
        """Note a parent by its content, as far as it lies in a file (save_strategy may be `no`)."""
        files = folder_hashes(folder, (FILE,) if ema else WEIGHT_FILES)
        self.parents.append({"name": name, "weight": weight, "files": files})

    def _has_ema(self, end: int) -> bool:
        """Whether a stage that has ended at `end` has a moving average; that it hasn't is told."""
        assert self.stage.train.ema is not None
        first, name = begins(self.stage.train.ema, self.max_steps), self.stage.name
        if end < first:
            say(f"{name}: ended at step {end}, before its average began (at step {first}): hands on its last weights")
        return end >= first

    def _scheduled(self, end: int) -> list[int]:
        return scheduled(self.stage, end, self.max_steps, self.steps_of_an_epoch)
