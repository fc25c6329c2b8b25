"""Cross entropy of a linear projection from its full logits: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import LceInputs, LceTally


def linear_cross_entropy_reference(inputs: LceInputs, reduction: str = "sum", tally: LceTally | None = None) -> Tensor:
    """The definition, with all (T, V) logits in memory; float64 for float64 inputs, else float32.

    Arguments and result are those of :func:`sambay_kernels.linear_cross_entropy`.
    """
    hidden, weight, labels, ignore_index, label_smoothing, z_loss, _ = inputs
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    supervised = labels != ignore_index
    targets = torch.where(supervised, labels, 0).long()
    log_probs = logits.log_softmax(-1)
    if tally is not None:
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        picked = logits.gather(1, targets[:, None])[:, 0]
        tally.add((picked >= logits.amax(-1))[supervised], entropy[supervised].detach())
    nll = -log_probs[torch.arange(len(labels), device=labels.device), targets]
    losses = (1.0 - label_smoothing) * nll - label_smoothing * log_probs.mean(-1)
    losses = losses + z_loss * logits.logsumexp(-1) ** 2
    losses = torch.where(supervised, losses, torch.zeros_like(losses))
    return losses.sum() if reduction == "sum" else losses
