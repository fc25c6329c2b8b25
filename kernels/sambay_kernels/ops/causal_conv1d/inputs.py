"""What a causal convolution is given, as one thing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ConvInputs(NamedTuple):
    """The arguments of `causal_conv1d`, in the order of the registered ops; shapes and meaning as there."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None = None
    activation: str | None = "silu"
    cu_seqlens: Tensor | None = None
    initial_state: Tensor | None = None

    def differentiable(self) -> tuple[Tensor | None, ...]:
        """The inputs that have gradients: all but activation and cu_seqlens."""
        return (*self[:3], self.initial_state)
