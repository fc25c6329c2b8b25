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
SHARES = frozenset({"min_lr_rate", "warmup_lr_rate", "min_lr_ratio"})
"""Of the learning rate."""
DECAYS = frozenset({"momentum", "alpha"})
"""Of an average, which a value of 1 would never move."""


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
    given: dict[str, str] = {}
    for part in train.optim_args.split(",") if train.optim_args is not None else ():
        name, _, number = part.strip().partition("=")
        given[name] = number
        flag = name in ("nesterov", "centered")
        if name not in known:
            reason = f"{train.optim} takes {', '.join(known) or 'none'}, each as name=value, got {part.strip()!r}"
            yield KeyProblem(("optim_args",), reason, train.optim_args)
        elif flag and number not in ("true", "false"):
            yield KeyProblem(("optim_args",), f"{name} must be true or false, got {number!r}", train.optim_args)
        elif not flag and not _is_number(number, below=1 if name in DECAYS else None):
            limits = "from 0 up to, but not, 1" if name in DECAYS and _is_number(number) else "from 0 up"
            wanted = f"a number {limits}" if _is_number(number.removeprefix("-")) else "a number"
            yield KeyProblem(("optim_args",), f"{name} must be {wanted}, got {number!r}", train.optim_args)
    if given.get("nesterov") == "true" and not (_positive(given, "momentum") and not _positive(given, "dampening")):
        reason = "nesterov=true needs a momentum above 0, and no dampening"
        yield KeyProblem(("optim_args",), reason, train.optim_args)


def _positive(given: dict[str, str], name: str) -> bool:
    return _is_number(given.get(name, "")) and float(given[name]) > 0


def _schedule_arguments(train: TrainSection) -> Iterator[KeyProblem]:
    key, name, given = "lr_scheduler_kwargs", train.lr_scheduler_type, train.lr_scheduler_kwargs or {}
    known = SCHEDULER_KWARGS.get(name, ())
    wrong = set()
    for inside, value in given.items():
        reason = _wrong_argument(inside, value) if inside in known else f"{name} takes {', '.join(known) or 'none'}"
        if reason:
            wrong.add(inside)
            yield KeyProblem((key, inside), reason, value)
    if "min_lr" in known and len({"min_lr", "min_lr_rate"} & given.keys()) != 1:
        yield KeyProblem((key,), f"{name} needs min_lr or min_lr_rate, one of them", given)
    if name == "warmup_stable_decay" and "num_decay_steps" not in wrong and not given.get("num_decay_steps"):
        yield KeyProblem((key,), f"{name} needs num_decay_steps, the length of its last part", given)
    if name == "polynomial" and "lr_end" not in wrong and given.get("lr_end", 1e-7) >= train.learning_rate:
        yield KeyProblem((key,), f"lr_end must be below learning_rate, which is {train.learning_rate:g}", given)
    if "min_lr" in given.keys() - wrong and given["min_lr"] > train.learning_rate:
        reason = f"is above learning_rate, which is {train.learning_rate:g}: the rate would rise where it should fall"
        yield KeyProblem((key, "min_lr"), reason, given["min_lr"])


def _wrong_argument(name: str, value: object) -> str | None:
    """What is wrong with an argument that the schedule takes."""
    if name in ("warmup_type", "decay_type"):
        return None if value in SHAPES else f"must be one of {', '.join(SHAPES)}"
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        return "must be a number from 0 up"
    if name in SHARES and value > 1:
        return "is a share of the learning rate, from 0 to 1"
    if name in ("num_cycles", "power", "timescale") and not value:
        return "must be above 0"
    if name in ("num_decay_steps", "num_stable_steps") and value % 1:
        return "must be a whole number of steps"
    return None


def _is_number(text: str, below: float | None = None) -> bool:
    """Whether a text is a number from 0 up, and below a limit where there is one."""
    try:
        return 0 <= float(text) < (float("inf") if below is None else below)
    except ValueError:
        return False
