"""Plain-torch linear cross entropy (flat: imports torch alone, so it can travel with a checkpoint)."""

import torch
from torch import Tensor


def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float, z_loss: float) -> Tensor:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    lse = logits.logsumexp(-1)
    loss = lse - (1.0 - label_smoothing) * logits.gather(1, labels[:, None])[:, 0]
    if label_smoothing:
        loss = loss - label_smoothing * logits.mean(-1)
    return loss + z_loss * lse.square() if z_loss else loss


def linear_cross_entropy_torch(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    chunk_size: int,
) -> Tensor:
    kept = (labels != ignore_index).nonzero()[:, 0]
    chosen, targets = hidden.index_select(0, kept), labels.index_select(0, kept)
    parts = [
        torch.utils.checkpoint.checkpoint(token_losses, h, weight, y, label_smoothing, z_loss, use_reentrant=False)
        for h, y in zip(chosen.split(chunk_size), targets.split(chunk_size), strict=True)
    ]
    losses = torch.cat(parts) if parts else hidden.sum(-1)[:0].to(torch.promote_types(hidden.dtype, torch.float32))
    if reduction == "sum":
        return losses.sum()
    return losses.new_zeros(labels.shape).index_copy(0, kept, losses)
