"""What a linear cross entropy is given, as one thing.

The file imports nothing but torch, so that it can travel inside an exported model.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LceInputs(NamedTuple):
    """The arguments of `linear_cross_entropy` but its reduction, in the order of the registered ops."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_size: int = 256


class LceTally:
    """What forward passes saw of each supervised token, in the order of the labels; see `token_statistics`."""

    def __init__(self) -> None:
        self.correct: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def add(self, correct: Tensor, entropy: Tensor) -> None:
        """The next tokens: whether none is likelier than the label, (n,) bool, and the distribution's entropy, (n,)."""
        self.correct.append(correct)
        self.entropy.append(entropy)
