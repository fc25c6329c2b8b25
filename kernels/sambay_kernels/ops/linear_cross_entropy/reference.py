"""Cross entropy of a linear projection from its full logits: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from .inputs import LceInputs
from .tally import LceTally


def linear_cross_entropy_reference(inputs: LceInputs, reduction: str = "sum", tally: LceTally | None = None) -> Tensor:
    """The definition, with all (T, V) logits in memory; float64 for float64 inputs, else float32.

    Arguments and result are those of :func:`sambay_kernels.linear_cross_entropy`.
    """
    hidden, weight, labels, smoothing = inputs.hidden, inputs.weight, inputs.labels, inputs.label_smoothing
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    logits = hidden.to(wide) @ weight.to(wide).T
    supervised = labels != inputs.ignore_index
    targets = torch.where(supervised, labels, 0).long()
    log_probs = logits.log_softmax(-1)
    if tally is not None:
        picked = logits.gather(1, targets[:, None])[:, 0]
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        tally.add((picked >= logits.amax(-1))[supervised], entropy[supervised].detach())
    log_p = log_probs[torch.arange(len(labels), device=labels.device), targets]
    losses = (1.0 - smoothing) * _of_target(log_p, inputs) - smoothing * log_probs.mean(-1)
    losses = losses + inputs.z_loss * logits.logsumexp(-1) ** 2
    if inputs.teacher_ids is not None:
        far = inputs.distill_weight * (inputs.teacher_ids >= 0).any(1).to(wide)
        losses = (1.0 - far) * losses + far * _divergence(logits, inputs)
    if inputs.weights is not None:
        losses = losses * inputs.weights.to(wide)
    losses = torch.where(supervised, losses, torch.zeros_like(losses))
    return losses.sum() if reduction == "sum" else losses


def _of_target(log_p: Tensor, inputs: LceInputs) -> Tensor:
    if inputs.loss_type == "dft":
        return -log_p.exp().detach() * log_p
    if inputs.loss_type == "power":
        return (1.0 - log_p.exp() ** inputs.parameter) / inputs.parameter
    if inputs.loss_type == "threshold":
        return torch.where(log_p.exp() >= inputs.parameter, -log_p, 0.0)
    return -log_p


def _divergence(logits: Tensor, inputs: LceInputs) -> Tensor:
    """(T,), token by token: the vocabulary's outcomes are merged into those that the teacher knows."""
    assert inputs.teacher_ids is not None and inputs.teacher_logprobs is not None
    found = []
    least = torch.finfo(inputs.teacher_logprobs.dtype).eps
    for row, ids, log_probs in zip(logits, inputs.teacher_ids.long(), inputs.teacher_logprobs, strict=True):
        ids, known = ids[ids >= 0], log_probs[ids >= 0].to(logits.dtype).exp()
        if not len(ids):
            found.append(row.sum() * 0.0)
            continue
        others = torch.ones_like(row, dtype=torch.bool).index_fill(0, ids, False)
        q, p = row[ids], known.log()
        if inputs.tail == "bucket" and others.any():
            q = torch.cat([q, row[others].logsumexp(0)[None]])
            p = torch.cat([p, (1.0 - known.sum()).clamp(min=least).log()[None]])
        q, p = (x.div(inputs.temperature).softmax(0) for x in (q, p))
        if inputs.divergence == "reverse":
            p, q = q, p
        mixed = inputs.skew * p + (1.0 - inputs.skew) * q if inputs.divergence == "skewed" else q
        found.append((p * (p / mixed).log()).sum())
    return torch.stack(found) if found else logits.sum(1)
