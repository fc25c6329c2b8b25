"""What an optimizer and a schedule take: their own arguments, and the keys that have no effect with them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from sft.recipe.problems import KeyProblem

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection

OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "sgd": ("momentum", "dampening", "nesterov"),
    "adagrad": ("lr_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "centered"),
}
"""What `optim_args` may hold; the other optimizers take none."""

COSINE = ("num_cycles",)
MIN_LR = (*COSINE, "min_lr", "min_lr_rate")
SCHEDULER_KWARGS: dict[str, tuple[str, ...]] = {
    "cosine": COSINE,
    "cosine_with_restarts": COSINE,
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": MIN_LR,
    "cosine_warmup_with_min_lr": (*MIN_LR, "warmup_lr_rate"),
    "warmup_stable_decay": (
        *("num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles"),
    ),
}
"""What `lr_scheduler_kwargs` may hold; the other schedules take none."""
SHAPES = ("linear", "cosine", "1-sqrt")


def optimizer_problems(train: TrainSection) -> list[KeyProblem]:
    """What the optimizer and the schedule of a stage don't take, or have no use for."""
    return [*_without_effect(train), *_optimizer_arguments(train), *_schedule_arguments(train)]


def _without_effect(train: TrainSection) -> Iterator[KeyProblem]:
    unread = {"adam_beta1", "adam_beta2", "adam_epsilon"}
    if "lion" in train.optim:
        unread = {"adam_epsilon"}
    elif "adam" in train.optim:
        unread = set()
    for key in sorted(unread):
        if train.changed(key):
            yield KeyProblem((key,), f"has no effect with optim {train.optim}", getattr(train, key))
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        reason = "has no effect with lr_scheduler_type constant; constant_with_warmup has one"
        yield KeyProblem(("warmup_steps",), reason, train.warmup_steps)


def _optimizer_arguments(train: TrainSection) -> Iterator[KeyProblem]:
    known = OPTIM_ARGS.get(train.optim, ())
    for part in train.optim_args.split(",") if train.optim_args is not None else ():
        name, _, number = part.strip().partition("=")
        flag = name in ("nesterov", "centered")
        if name not in known:
            reason = f"{train.optim} takes {', '.join(known) or 'none'}, each as name=value, got {part.strip()!r}"
            yield KeyProblem(("optim_args",), reason, train.optim_args)
        elif number not in ("true", "false") if flag else not _is_number(number):
            reason = f"{name} must be {'true or false' if flag else 'a number'}, got {number!r}"
            yield KeyProblem(("optim_args",), reason, train.optim_args)


def _schedule_arguments(train: TrainSection) -> Iterator[KeyProblem]:
    key, name, given = "lr_scheduler_kwargs", train.lr_scheduler_type, train.lr_scheduler_kwargs or {}
    known = SCHEDULER_KWARGS.get(name, ())
    for inside, value in given.items():
        if inside not in known:
            yield KeyProblem((key, inside), f"{name} takes {', '.join(known) or 'none'}", value)
        elif inside in ("warmup_type", "decay_type"):
            if value not in SHAPES:
                yield KeyProblem((key, inside), f"must be one of {', '.join(SHAPES)}", value)
        elif isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            yield KeyProblem((key, inside), "must be a number from 0 up", value)
            return
    if "min_lr" in known and len({"min_lr", "min_lr_rate"} & given.keys()) != 1:
        yield KeyProblem((key,), f"{name} needs min_lr or min_lr_rate, one of them", given)
    if name == "warmup_stable_decay" and not given.get("num_decay_steps"):
        yield KeyProblem((key,), f"{name} needs num_decay_steps, the length of its last part", given)
    if name == "polynomial" and given.get("lr_end", 1e-7) >= train.learning_rate:
        yield KeyProblem((key,), f"lr_end must be below learning_rate, which is {train.learning_rate:g}", given)


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
