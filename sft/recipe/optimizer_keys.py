"""What an optimizer and a schedule take: their own arguments, and the keys that have no effect with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from sft.recipe.problems import KeyProblem, Section, raise_problems

if TYPE_CHECKING:
    from sft.recipe.train_keys import TrainSection

OWN_OPTIMIZERS: dict[str, dict[str, Any]] = {"muon": {"optim": "adamw_torch_fused", "optim_args": None}}
"""Optimizers that transformers doesn't have, and what it is asked for instead: what trains the rest."""

ROUNDED = ("adamw_torch", "adamw_torch_fused")
"""Optimizers that there is a form of for weights in bfloat16 (sft.train.stochastic)."""

OPTIM_ARGS: dict[str, tuple[str, ...]] = {
    "muon": ("momentum", "nesterov", "ns_steps", "adjust_lr_fn"),
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


MOMENTUM = {"muon": "0.95"}
"""By default, where there is one."""
ADJUSTMENTS = ("match_rms_adamw", "original")
"""How Muon's rate goes by a matrix's shape: to AdamW's size of step, or as Muon was first published."""


class ParamGroup(Section):
    """Parameters that are trained with a learning rate or a weight decay of their own."""

    match: str = Field(min_length=1, description="Regular expression, found anywhere in a parameter's name.")
    learning_rate: float | None = Field(default=None, ge=0, description="Highest one. Default: that of the others.")
    weight_decay: float | None = Field(
        default=None, ge=0, description="Also of what takes none otherwise. Default: as without the group."
    )

    @model_validator(mode="after")
    def _check(self) -> ParamGroup:
        try:
            re.compile(self.match)
        except re.error as error:
            reason = f"{self.match!r} is no regular expression: {error}"
            raise_problems("group", [KeyProblem(("match",), reason, self.match)])
        if self.learning_rate is None and self.weight_decay is None:
            reason = "says neither learning_rate nor weight_decay, so it has no effect"
            raise_problems("group", [KeyProblem((), reason, None)])
        return self


def optimizer_problems(train: TrainSection) -> list[KeyProblem]:
    """What the optimizer and the schedule of a stage don't take, or have no use for."""
    return [
        *_without_effect(train),
        *_optimizer_arguments(train),
        *_schedule_arguments(train),
        *_half_weights(train),
    ]


def _half_weights(train: TrainSection) -> Iterator[KeyProblem]:
    """What doesn't go with weights in bfloat16, or needs them."""
    if train.weights_dtype == "float32":
        if train.changed("optim_state_dtype"):
            reason = "has no effect without `weights_dtype: bfloat16`"
            yield KeyProblem(("optim_state_dtype",), reason, train.optim_state_dtype)
        return
    where, held = ("weights_dtype",), train.weights_dtype
    if train.optim not in ROUNDED:
        reason = f"bfloat16 has an AdamW of its own, which {train.optim} isn't: use {' or '.join(ROUNDED)}"
        yield KeyProblem(where, reason, held)
    if train.use_peft:
        reason = "has no effect with `use_peft: true`: adapters are float32, and what they stand on isn't trained"
        yield KeyProblem(where, reason, held)
    if train.deepspeed is not None:
        reason = "DeepSpeed keeps float32 copies of the weights: leave one of the two out"
        yield KeyProblem(where, reason, held)
    if train.bf16 is False:
        yield KeyProblem(where, "needs products in bfloat16: leave `bf16: false` out", held)


def _without_effect(train: TrainSection) -> Iterator[KeyProblem]:
    unread = {"adam_beta1", "adam_beta2", "adam_epsilon"}
    if "lion" in train.optim:
        unread = {"adam_epsilon"}
    elif "adam" in train.optim or train.optim == "muon":
        unread = set()
    if train.optim != "muon":
        unread.add("adamw_learning_rate")
    for key in sorted(unread):
        if train.changed(key):
            yield KeyProblem((key,), f"has no effect with optim {train.optim}", getattr(train, key))
    if train.lr_scheduler_type == "constant" and train.warmup_steps:
        reason = "has no effect with lr_scheduler_type constant; constant_with_warmup has one"
        yield KeyProblem(("warmup_steps",), reason, train.warmup_steps)


def given_arguments(text: str | None) -> dict[str, str]:
    """`momentum=0.9, nesterov=true` as names and values."""
    return dict(_pairs(text))


def _pairs(text: str | None) -> list[tuple[str, str]]:
    parts = (part.strip().partition("=") for part in (text.split(",") if text is not None else ()))
    return [(name, value) for name, _, value in parts]


def _optimizer_arguments(train: TrainSection) -> Iterator[KeyProblem]:
    known = OPTIM_ARGS.get(train.optim, ())
    given = given_arguments(train.optim_args)
    for name, value in given.items():
        if name in known:
            reason = _wrong_value(name, value)
        else:
            part = f"{name}={value}" if value else name
            reason = f"{train.optim} takes {', '.join(known) or 'none'}, each as name=value, got {part!r}"
        if reason:
            yield KeyProblem(("optim_args",), reason, train.optim_args)
    names = [name for name, _ in _pairs(train.optim_args)]
    for name in sorted({name for name in names if name in known and names.count(name) > 1}):
        yield KeyProblem(("optim_args",), f"says {name} twice: leave one of them out", train.optim_args)
    momentum = {"momentum": MOMENTUM.get(train.optim, ""), **given}
    if given.get("nesterov") == "true" and not (_positive(momentum, "momentum") and not _positive(given, "dampening")):
        reason = "nesterov=true needs a momentum above 0, and no dampening"
        yield KeyProblem(("optim_args",), reason, train.optim_args)


def _wrong_value(name: str, value: str) -> str | None:
    """What is wrong with an argument that the optimizer takes."""
    if name in ("nesterov", "centered"):
        return None if value in ("true", "false") else f"{name} must be true or false, got {value!r}"
    if name == "adjust_lr_fn":
        return None if value in ADJUSTMENTS else f"{name} must be one of {', '.join(ADJUSTMENTS)}, got {value!r}"
    if name == "ns_steps":
        return (
            None if re.fullmatch("[1-9][0-9]?", value) else f"{name} must be a whole number from 1 to 99, got {value!r}"
        )
    if _is_number(value, below=1 if name in DECAYS else None):
        return None
    limits = "from 0 up to, but not, 1" if name in DECAYS and _is_number(value) else "from 0 up"
    wanted = f"a number {limits}" if _is_number(value.removeprefix("-")) else "a number"
    return f"{name} must be {wanted}, got {value!r}"


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
    if "min_lr" in given.keys() - wrong and not train.learning_rate:
        # All rates, those of param_groups too, end at the share of theirs that it is of this one.
        reason = "is taken as a share of learning_rate, which is 0: set min_lr_rate, the share, in its place"
        yield KeyProblem((key, "min_lr"), reason, given["min_lr"])
    elif "min_lr" in given.keys() - wrong and given["min_lr"] > train.learning_rate:
        reason = f"is above learning_rate, which is {train.learning_rate:g}: the rate would rise where it should fall"
        yield KeyProblem((key, "min_lr"), reason, given["min_lr"])
    if train.max_steps > 0 and not wrong:
        yield from schedule_problems(train, train.max_steps)


def warmup_of(train: TrainSection, steps: int) -> int:
    """The steps of warm-up of a stage of `steps`, as transformers counts them."""
    return int(train.warmup_steps) if train.warmup_steps >= 1 else math.ceil(steps * train.warmup_steps)


def schedule_problems(train: TrainSection, steps: int) -> Iterator[KeyProblem]:
    """Parts of the schedule that a stage of `steps` has no room for."""
    given, warmup = train.lr_scheduler_kwargs or {}, warmup_of(train, steps)
    stable = int(given.get("num_stable_steps", 0))
    left, decay = max(0, steps - warmup - stable), given.get("num_decay_steps", 0)
    if train.lr_scheduler_type == "warmup_stable_decay" and decay > left:
        before = [*(["warm-up"] if warmup else []), *(["num_stable_steps"] if stable else [])]
        after = f" after {' and '.join(before)}" if before else ""
        reason = f"must be at most {left:,}, which is what the stage's steps ({steps:,}) leave{after}, got {decay:,}"
        yield KeyProblem(("lr_scheduler_kwargs", "num_decay_steps"), reason, decay)
    if train.lr_scheduler_type == "polynomial" and warmup == steps:
        # The rate after the last step, which nothing trains with, would be a division by zero.
        reason = f"leaves polynomial none of the stage's steps ({steps:,}) to fall in: lower it"
        yield KeyProblem(("warmup_steps",), reason, train.warmup_steps)


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
