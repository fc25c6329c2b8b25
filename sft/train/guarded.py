"""The trainer's side of the guard: when a step is judged, what is undone of one that is left out, and the return."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.checkpoints import checkpoint_folders, read_marker
from sft.train.guard import Guard, gate_deepspeed
from sft.utils.distributed import decide, is_main
from sft.utils.errors import UserError
from sft.utils.say import say
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.train.trainer import SambayTrainer


class GuardedSteps(TrainerCallback):
    """Lets the guard look at each step before it is taken. A step that is left out changes neither weights nor moments;
    the rate's schedule, the rows and the random numbers go on.

    `documents`: the names of the documents of a row; `saved`: the steps, up to one, that the recipe has checkpoints of.
    """

    def __init__(
        self,
        trainer: SambayTrainer,
        guard: Guard,
        documents: Callable[[int], Sequence[str]],
        saved: Callable[[int], Sequence[int]],
    ) -> None:
        self._trainer, self.guard, self._documents, self._saved = trainer, guard, documents, saved
        self._losses: list[Tensor] = []
        self._running: Tensor | None = None
        self._before: tuple[Tensor, Tensor | None] | None = None
        self._judged = self.leaves_out = False
        self._since = 0

    # ---- during a step ----

    def begin(self) -> None:
        """A step begins: what it will have added up can be taken back from here."""
        trainer = self._trainer
        self._losses, self._judged, self.leaves_out = [], False, False
        self._before = trainer._tr_loss.clone(), trainer.token_sums.mark()
        self._since = trainer._globalstep_last_logged

    def runs(self, loss: Tensor) -> None:
        """The loss of the micro-batch that is run now."""
        self._running = loss.detach()

    def ran(self, loss: Tensor) -> None:
        """The loss of one that has been run."""
        self._losses.append(loss)
        self._running = None

    def gate(self) -> None:
        """Have an engine that steps by itself ask first. Raises UserError where it wouldn't know its gradient norm."""
        engine: Any = self._trainer.model_wrapped
        if not getattr(engine.optimizer, "compute_grad_norm", True):
            raise UserError(
                "train.guard looks at gradient norms: take zero_optimization.compute_grad_norm: false out of the "
                "DeepSpeed settings, or set guard: null."
            )
        gate_deepspeed(engine, self.harmful)

    def harmful(self, norm: float) -> bool:
        """Whether the step that is about to be taken is to be left out. Waits for the device."""
        losses = self._losses if self._running is None else [*self._losses, self._running]
        loss = float(torch.stack([one.float() for one in losses]).sum())
        if not torch.isfinite(self._trainer._tr_loss):
            loss = math.nan
        self._judged, self.leaves_out = True, self.guard.judge(loss, norm)
        return self.leaves_out

    def look(self, model: Any, norm: float) -> bool:
        """Judge a step that no engine has judged; take back what one added up that is left out."""
        if not self._judged:
            self.harmful(norm)
        if not self.leaves_out:
            return False
        assert self._before is not None
        loss, sums = self._before
        self._trainer._tr_loss.copy_(loss)
        self._trainer.token_sums.undo(sums)
        if self._trainer.is_deepspeed_enabled:
            # Or the schedule would wait for a step in its place.
            self._trainer.model_wrapped.optimizer.overflow = False  # type: ignore[union-attr]
        else:
            for parameter in model.parameters():
                parameter.grad = None  # an optimizer passes over it, moments, decay and all
        return True

    # ---- at its end ----

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The file of skipped rows as the checkpoint knows it."""
        if is_main():
            self.guard.write()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell of a step that was left out; return to a checkpoint, or stop, where they are too many."""
        if not self.leaves_out:
            return
        step = state.global_step
        named = [(row, names) for row in self._trainer.rows_of(step) if (names := list(self._documents(row)))]
        self.guard.note(step, [row for row, _ in named], [names for _, names in named], write=is_main())
        stage = self._trainer.identity.get("stage")
        say(f"{stage}: step {step:,} left out: {self.guard.why}")
        self._trainer.alert("diverging", f"the step was left out: {self.guard.why}")
        if not self.guard.is_too_much(step):
            return
        folder = decide(lambda: self._return_to(step)) if self.guard.may_return() else None
        if folder is None:
            self._trainer.refuse(self.guard.told(step))
            return
        recent = self.guard.recent(step)
        self._trainer.return_to(folder)
        self.guard.rolled_back.append({"step": step, "to": int(folder.name.rpartition("-")[2])})
        told = counted(len(recent), "step") + " left out of the last "
        text = f"{told}{step - recent[0] + 1:,}: back to the weights of {folder.name}, on with the next rows"
        say(f"{stage}: {text}")
        self._trainer.alert("diverging", text)

    def _return_to(self, step: int) -> Path | None:
        """The newest checkpoint that isn't what the stage has now, if there is one; else the newest.

        Of those that the recipe asks for: a signal may have had others saved, and makes no difference.
        """
        self._trainer.marking.finish()
        skipped, scheduled = {line["step"] for line in self.guard.skipped}, set(self._saved(step))
        found = []
        for saved, folder in reversed(checkpoint_folders(Path(str(self._trainer.args.output_dir)))):
            if saved in scheduled and (marker := read_marker(folder)) and self._trainer.can_return_to(marker):
                found.append(folder)
                if any(taken not in skipped for taken in range(saved + 1, step + 1)):
                    return folder
        return found[0] if found else None

    # ---- in the log ----

    def correct(self, logs: dict[str, float], step: int) -> None:
        """The mean loss of a line of the log is that of the steps that were taken; one without any tells none."""
        left_out = sum(self._since < line["step"] <= step for line in self.guard.skipped)
        steps = step - self._since
        if left_out and "loss" in logs:
            if left_out == steps:
                del logs["loss"]
            else:
                logs["loss"] *= steps / (steps - left_out)
        if self.guard.skipped:
            logs["skipped_steps"] = len(self.guard.skipped)
