"""The loss of held-out rows while a stage trains: before its first step, at its last, and in between as asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.probe import undisturbed
from sft.train.reshard import fill
from sft.train.sharded import forward_only
from sft.utils.distributed import alike, gather
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from sft.recipe.train_keys import TrainSection
    from sft.train.trainer import SambayTrainer

LOSS, TOKENS = "eval_loss", "eval_supervised_tokens"
"""What a line of the log calls the loss of the held-out rows, and the number of tokens that it is the mean of."""


@dataclass(frozen=True)
class Schedule:
    """When to look: every `steps` (None: not so), or after `epochs`; before the first step and at the last always."""

    steps: float | None = None
    epochs: bool = False

    @classmethod
    def of(cls, train: TrainSection) -> Schedule:
        """As transformers reads these keys: without `eval_steps` at every logging step."""
        every = train.logging_steps if train.eval_steps is None else train.eval_steps
        return cls(every if train.eval_strategy == "steps" else None, train.eval_strategy == "epoch")

    def due(self, step: int, last: int, steps_of_an_epoch: int) -> bool:
        """Whether to look after `step`. The same on all processes, and again when the step is done again."""
        if step == last or (self.epochs and step % steps_of_an_epoch == 0):
            return True
        if self.steps is None:
            return False
        return step % (math.ceil(last * self.steps) if self.steps < 1 else int(self.steps)) == 0


class Validation(TrainerCallback):
    """Takes the loss of `rows` and logs it, without a trace in what is trained."""

    def __init__(
        self,
        trainer: SambayTrainer,
        rows: Dataset,
        train: TrainSection,
        candidates: Callable[[int], list[int]] = lambda step: [],
    ) -> None:
        """`candidates`: of the steps up to one those whose weights may be handed on, which are looked at, too."""
        self._trainer, self._rows, self._candidates = trainer, rows.with_format("numpy"), candidates
        self._schedule, self._batch_size = Schedule.of(train), train.per_device_eval_batch_size

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Of the start; a stage that is resumed has it in its log."""
        if state.global_step == 0:
            self._look(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before a checkpoint of this step is saved, which then holds it in its log."""
        if self._due(state):
            self._look(state)

    def look_at_the_end(self, state: TrainerState) -> None:
        """Of a stage that ends here, before its last step, unless this step was looked at already."""
        if not self._due(state):
            self._look(state)

    def of_final(self, folder: Path) -> float:
        """The loss with the weights in `folder`, which the model keeps: what comes after the last step."""
        model = self._trainer.model
        fill(model, folder)
        if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
            model.to(self._trainer.args.device)  # a stage that was killed after its last step has no engine
        loss, _ = held_out_loss(self._trainer, self._rows, self._batch_size)
        return loss

    def _due(self, state: TrainerState) -> bool:
        step = state.global_step
        asked = self._schedule.due(step, state.max_steps, self._trainer.steps_of_an_epoch)
        return asked or step in self._candidates(step)

    def _look(self, state: TrainerState) -> None:
        self._trainer.pause()
        loss, tokens = held_out_loss(self._trainer, self._rows, self._batch_size)
        with alike():
            _refuse_infinite(loss, state.global_step)
        self._trainer.log_aside({LOSS: loss, TOKENS: tokens})


def _refuse_infinite(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise UserError(
            f"The loss of the held-out rows (data.validation) after step {step} isn't finite: the model's weights are "
            "broken, or training diverged."
        )


def held_out_loss(trainer: SambayTrainer, rows: Dataset, batch_size: int) -> tuple[float, int]:
    """The mean loss of all supervised tokens of `rows`, over all processes, and their number.

    Each process (or group that shares rows) takes its part in as many batches as the others: an engine may need all of
    them in each pass.
    """
    total, tokens = 0.0, 0
    with undisturbed(trainer.model), forward_only(trainer.model_wrapped), torch.no_grad():
        trainer.model_wrapped.eval()
        data = trainer.data_ranks
        for batch in _share(rows, batch_size, data.number, data.count):
            inputs = trainer._prepare_inputs(trainer.data_collator(batch))
            supervised = int(inputs["num_supervised"])
            loss = trainer.compute_loss(trainer.model_wrapped, inputs) / trainer.accelerator.num_processes
            total, tokens = total + loss.double().item() * supervised, tokens + supervised
    # Summed in the order of the ranks, so that all come to the very same number.
    parts = gather((total, tokens))
    tokens = sum(count for _, count in parts)
    return math.fsum(part for part, _ in parts) / max(tokens, 1), tokens


def _share(rows: Dataset, size: int, rank: int, processes: int) -> Iterator[list[dict[str, Any]]]:
    """The batches, of at most `size` rows, of one of `processes`; an empty row where there is none left for it."""
    for first in range(0, len(rows), size * processes):
        start = first + rank * size
        mine: list[dict[str, Any]] = [rows[index] for index in range(start, min(start + size, len(rows)))]
        yield mine or [{"input_ids": [], "assistant_masks": [], "seq_lengths": []}]
