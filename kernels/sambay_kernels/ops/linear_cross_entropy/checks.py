"""The options of a linear cross entropy that choose its loss, checked."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...runtime.checks import MOST, check_real, check_tensor
from .distill import LCE_DIVERGENCES, LCE_TAILS
from .family import LCE_TYPES
from .op import OP

PARAMETERS = {"power": "alpha", "threshold": "threshold"}
"""Loss type -> the name of its parameter."""
ID_TYPES = (torch.int64, torch.int32)
LEAST = 1e-6  # of what is divided by


class Teacher(NamedTuple):
    """What `linear_cross_entropy` is told of a teacher, in the order of `LceInputs`."""

    ids: Tensor | None
    logprobs: Tensor | None
    distill_weight: float
    divergence: str
    skew: float
    tail: str
    temperature: float

    def read(self) -> tuple[Any, ...]:
        """The same; without its tensors where nothing would read them."""
        tensors = (self.ids, self.logprobs) if self.distill_weight else (None, None)
        weight, skew, temperature = float(self.distill_weight), float(self.skew), float(self.temperature)
        return (*tensors, weight, self.divergence, skew, self.tail, temperature)


def check_loss_type(loss_type: Any, alpha: Any, threshold: Any) -> float:
    """The loss type's own parameter, 0.0 where it has none. Raises ValueError or TypeError naming the argument."""
    _check_word("loss_type", loss_type, LCE_TYPES)
    given = {"alpha": alpha, "threshold": threshold}
    wanted = PARAMETERS.get(loss_type)
    for name, value in given.items():
        if value is not None:
            # Not 0: power would divide by it, and is nll in the limit; a threshold of 0 or 1 leaves all or nothing.
            check_real(OP, name, value, least=LEAST, most=MOST if name == "alpha" else 1.0 - LEAST)
        if (name == wanted) != (value is not None):
            need = f"loss_type {loss_type!r} needs {name}" if name == wanted else f"{name} is not for {loss_type!r}"
            raise ValueError(f"{OP}: {need}")
    return 0.0 if wanted is None else float(given[wanted])


def check_teacher(hidden: Tensor, teacher: Teacher) -> None:
    """Check what is told of a teacher. Raises ValueError or TypeError naming the argument."""
    check_real(OP, "distill_weight", teacher.distill_weight, least=0.0, most=1.0)
    check_real(OP, "skew", teacher.skew, least=0.0, most=1.0 - LEAST)
    check_real(OP, "temperature", teacher.temperature, least=LEAST)
    _check_word("divergence", teacher.divergence, LCE_DIVERGENCES)
    _check_word("tail", teacher.tail, LCE_TAILS)
    ids, logprobs = teacher.ids, teacher.logprobs
    if ids is None and logprobs is None:
        if teacher.distill_weight:
            raise ValueError(f"{OP}: distill_weight needs teacher_ids and teacher_logprobs")
        return
    if not isinstance(ids, Tensor):
        raise TypeError(f"{OP}: teacher_ids must be a tensor, got {type(ids)}")
    if ids.dtype not in ID_TYPES:
        raise ValueError(f"{OP}: teacher_ids must be int64 or int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[0] != hidden.shape[0] or ids.device != hidden.device:
        raise ValueError(
            f"{OP}: teacher_ids must have shape ({hidden.shape[0]}, k) and be on {hidden.device}, "
            f"got {tuple(ids.shape)} on {ids.device}"
        )
    if not isinstance(logprobs, Tensor):
        raise TypeError(f"{OP}: teacher_logprobs must be a tensor, got {type(logprobs)}")
    check_tensor(OP, "teacher_logprobs", logprobs, tuple(ids.shape), hidden.device)


def _check_word(name: str, value: Any, known: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{OP}: {name} must be one of {', '.join(known)}, got {value!r}")
