"""What a linear cross entropy is given, as one thing.

The file imports nothing but torch, so that it can travel inside an exported model.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class LceInputs(NamedTuple):
    """The arguments of `linear_cross_entropy` but its reduction, in the order of the registered ops.

    `parameter` is the loss type's own: alpha of `power`, the threshold of `threshold`. `rounded`: what the two products
    of a sum's gradients multiply is rounded to bfloat16.
    """

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_size: int = 256
    weights: Tensor | None = None
    loss_type: str = "nll"
    parameter: float = 0.0
    teacher_ids: Tensor | None = None
    teacher_logprobs: Tensor | None = None
    distill_weight: float = 0.0
    divergence: str = "forward"
    skew: float = 0.1
    tail: str = "bucket"
    temperature: float = 1.0
    rounded: bool = False
