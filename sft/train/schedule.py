"""Whether a stage has the steps that its learning rate's schedule asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sft.recipe.optimizer_keys import schedule_problems, warmup_of
from sft.recipe.problems import refuse
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection


def check_schedule(train: TrainSection, steps: int, stage: str) -> None:
    """Raise UsageError when the schedule doesn't fit into the stage's `steps`; say so when they end in its warm-up."""
    place = f"stages[{stage}].train"
    refuse(schedule_problems(train, steps), lambda loc: f"{place}.{'.'.join(map(str, loc))}")
    warmup = warmup_of(train, steps)
    if warmup >= steps and (share := _share_at(train, steps - 1, steps)) < 0.99:
        # No refusal: a long recipe is tried for a few steps.
        say(
            f"{stage}: its {steps:,} steps end in a warm-up of {warmup:,}, where the learning rate reaches {share:.1%} "
            "of learning_rate"
        )


def _share_at(train: TrainSection, step: int, steps: int) -> float:
    """What the schedule makes of the learning rate for the step behind `step` others."""
    import torch
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=train.learning_rate)
    schedule = get_scheduler(
        train.lr_scheduler_type,
        optimizer,
        num_warmup_steps=warmup_of(train, steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=train.lr_scheduler_kwargs,
    )
    return float(schedule.lr_lambdas[0](step))
