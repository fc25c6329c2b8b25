"""What a selective scan is given, as one thing.

The file imports nothing but torch, so that it can travel inside an exported model.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ScanInputs(NamedTuple):
    """The arguments of `selective_scan`, in the order of the registered ops; shapes and meaning as there."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    z: Tensor | None = None
    delta_bias: Tensor | None = None
    delta_softplus: bool = True
    cu_seqlens: Tensor | None = None
    initial_state: Tensor | None = None

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that have gradients: all but delta_softplus and cu_seqlens."""
        return (*self[:8], self.initial_state)
