"""The end of a stage before its last step: once the rows are known as the recipe asks, or a suite gets no better."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.evaluations import passed
from sft.train.memorised import ACCURACY
from sft.utils.distributed import alike
from sft.utils.errors import UserError
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.schema import Stage
    from sft.train.trainer import SambayTrainer
    from sft.train.validation import Validation


def stopped_at(stage: Stage, state: TrainerState) -> dict[str, Any] | None:
    """The step, and what was reached there, at which `state` was ended by the stage's `stop_when`; None: it wasn't.

    It follows from the log, which is the same on all processes and part of each checkpoint.
    """
    asked = stage.stop_when
    if asked is None:
        return None
    if asked.token_accuracy is not None:
        lines = (line for line in reversed(state.log_history) if line["step"] == state.global_step and ACCURACY in line)
        reached = next((line[ACCURACY] for line in lines), 0.0)
        if reached >= asked.token_accuracy:
            return {"step": state.global_step, ACCURACY: reached}
    if asked.suite is not None and asked.patience is not None:
        found = passed(asked.suite, state)
        best = max(found, key=lambda one: (one[1], -one[0]), default=None)
        if best is not None and found[-1][0] == state.global_step and len(found) - found.index(best) > asked.patience:
            return {"step": state.global_step, "metric": asked.suite, "best": best[1], "best_step": best[0]}
    return None


def _reached(found: dict[str, Any]) -> str:
    """What `stopped_at` says, in words."""
    if ACCURACY in found:
        return f"with a token accuracy of {found[ACCURACY]:.4f}"
    return f"as {found['metric']} has got no better since step {found['best_step']:,} ({found['best']:.1%})"


class StopWhen(TrainerCallback):
    """Ends a stage at the line of the log that reaches what is asked for, with its checkpoint saved."""

    def __init__(self, trainer: SambayTrainer, stage: Stage, validation: Validation | None) -> None:
        self._trainer, self._stage, self._validation = trainer, stage, validation
        self._ended: int | None = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """A line of training, or of answers to suites; those of held-out rows are neither."""
        asked = self._stage.stop_when
        if not logs or asked is None:
            return
        if "loss" in logs and asked.token_accuracy is not None:
            with alike():
                self._refuse_unknown(logs)
        found = stopped_at(self._stage, state)
        if found is None or state.global_step >= state.max_steps:
            return
        if self._ended == state.global_step:
            return  # found at another line of this step
        self._ended = state.global_step
        say(f"{self._stage.name}: ended at step {found['step']:,}, {_reached(found)}")
        if self._validation is not None:
            self._validation.look_at_the_end(state)
        if state.global_step % self._trainer.steps_of_an_epoch:
            self._trainer.token_sums.end_epoch(state.epoch)
        control.should_training_stop = True
        control.should_save = args.save_strategy != "no"

    def _refuse_unknown(self, logs: dict[str, Any]) -> None:
        if ACCURACY not in logs and logs["supervised_tokens"]:
            raise UserError(
                f"stages[{self._stage.name}].stop_when: this model's own loss doesn't tell which tokens it predicts: "
                "leave it out."
            )
