"""Whether a run's numbers are finite: noted at each step on the device, read only where the host waits anyway."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sft.train.agree import over_processes

NEVER = (1 << 62) - 1
NAMES = ("loss", "gradient norm")


class StepNumbers:
    """The first step at which the loss, or the gradient norm, was not a finite number."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def note(self, step: int, loss: Tensor, grad_norm: Tensor | float) -> None:
        """Look at a step's numbers without waiting for them. DeepSpeed says -1 for a norm that isn't finite."""
        # torch.full, not torch.tensor: bringing a number to a GPU waits for it.
        norm = grad_norm.detach() if isinstance(grad_norm, Tensor) else loss.new_full((), grad_norm)
        sound = torch.stack([loss.detach().isfinite(), norm.isfinite() & (norm >= 0)])
        never, now = (torch.full_like(sound, number, dtype=torch.int64) for number in (NEVER, step))
        self._first = torch.minimum(never if self._first is None else self._first, torch.where(sound, never, now))

    def fault(self) -> str:
        """What was not finite, on any process; empty when all was. Waits for the device; all processes must call it."""
        found = [NEVER] * len(NAMES) if self._first is None else self._first.tolist()
        steps = over_processes(found, torch.distributed.ReduceOp.MIN)
        if min(steps) == NEVER:
            return ""
        return f"The {NAMES[steps.index(min(steps))]} is not a finite number at step {min(steps)}"


def weights_fault(model: Any, optimizer: Any) -> str:
    """How many trainable tensors, and tensors of the optimizer, hold a value that isn't finite, on any process.

    A weight whose square isn't a float32 either is as bad: the next step can't compute with it. Empty when all are
    sound. Waits for the device; all processes must call it.
    """
    # ZeRO-3 keeps this process's part of a parameter beside it.
    weights = [getattr(p, "ds_tensor", p) for p in model.parameters() if p.requires_grad]
    held: list[Tensor] = []
    if optimizer is not None:
        # The masters of an engine that trains copies are in its groups.
        held = [p for group in optimizer.param_groups for p in group["params"]]
        held += [value for state in optimizer.state.values() for value in _tensors(state)]
    seen = {id(weight) for weight in weights}
    counts = [_not_finite(weights, power=2), _not_finite((t for t in held if id(t) not in seen), power=1)]
    weight, other = over_processes(counts, torch.distributed.ReduceOp.MAX)
    if weight:
        return f"{weight} of {len(weights)} trainable tensors are not finite, or too large to compute with"
    return f"{other} tensors of the optimizer are not finite" if other else ""


def _tensors(state: Any) -> list[Tensor]:
    return [value for value in state.values() if isinstance(value, Tensor)] if isinstance(state, dict) else []


def _not_finite(tensors: Iterable[Tensor], power: int) -> int:
    """How many tensors hold a value whose power isn't finite: from their largest values, found without copies."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor.detach())
    largest = [torch.stack(torch._foreach_norm(group, torch.inf)).float() for group in groups.values()]
    return sum(int((~norms.pow(power).isfinite()).sum()) for norms in largest)
