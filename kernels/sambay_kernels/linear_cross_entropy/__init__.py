"""Cross entropy of a linear projection without its full logits."""

import torch.utils.checkpoint
from torch import Tensor

from .torch_backend import linear_cross_entropy_torch

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
    chunk_size: int = 256,
) -> Tensor:
    """Cross entropy of hidden @ weight.T against labels, over supervised tokens only."""
    return linear_cross_entropy_torch(
        hidden, weight, labels, ignore_index, label_smoothing, z_loss, reduction, chunk_size
    )
