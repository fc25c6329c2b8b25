"""From what is known of each token's logits to its loss and its gradient, whichever backend made them.

The gradient of a token's loss to its logits z_j is

    slope * exp(z_j - norm) - share - pull * [j is the target]

and, where a teacher names the token j, `of_kept` in place of the first summand: then the norm is the log-sum-exp of the
other tokens alone, so that no small difference of large numbers is taken.

The file imports torch and its neighbours alone, so that it can travel inside an exported model.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .distill import LceTeacher, lce_divergence
from .family import lce_of_target
from .inputs import LceInputs


class LceTerms(NamedTuple):
    """Losses and the numbers of their gradient, (n, 1) each but `of_kept`, (n, k) or None."""

    losses: Tensor
    norm: Tensor
    slope: Tensor
    share: Tensor
    pull: Tensor
    of_kept: Tensor | None = None


def lce_terms(
    inputs: LceInputs,
    rest: Tensor,
    picked: Tensor,
    mean: Tensor | float,
    teacher: LceTeacher | None = None,
    kept: Tensor | None = None,
) -> LceTerms:
    """Losses and gradients of n tokens, without their weights.

    Args:
        rest: (n, 1) log-sum-exp of the logits, but of those that a teacher names.
        picked: (n, 1) the target's logit.
        mean: (n, 1) of all logits; anything without label smoothing.
        kept: (n, k) the logits that the teacher names.
    """
    if teacher is None or kept is None:
        losses, slope, pull = _lce_labels(inputs, rest, picked, mean)
        return LceTerms(losses, rest, slope, _lce_share(inputs, rest), pull)
    named = kept.masked_fill(teacher.ids < 0, float("-inf"))
    lse = torch.logaddexp(rest, named.logsumexp(1, keepdim=True))
    losses, slope, pull = _lce_labels(inputs, lse, picked, mean)
    how = (inputs.divergence, inputs.skew, inputs.tail, inputs.temperature)
    apart, of_kept, of_rest = lce_divergence(kept, rest, teacher, *how)
    far = inputs.distill_weight * (teacher.ids >= 0).any(1, keepdim=True).to(rest.dtype)
    near = 1.0 - far
    nothing = rest == float("-inf")
    return LceTerms(
        near * losses + far * apart,
        rest.masked_fill(nothing, 0.0),
        (near * slope * (rest - lse).exp() + far * of_rest).masked_fill(nothing, 0.0),
        near * _lce_share(inputs, rest),
        near * pull,
        near * slope * (named - lse).exp() + far * of_kept,
    )


def _lce_share(inputs: LceInputs, like: Tensor) -> Tensor:
    return torch.full_like(like, inputs.label_smoothing / inputs.weight.shape[0])


def _lce_labels(inputs: LceInputs, lse: Tensor, picked: Tensor, mean: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of the labels, the factor of the softmax in its gradient, and what is taken off at the target."""
    smoothing, z_loss = inputs.label_smoothing, inputs.z_loss
    if inputs.loss_type == "nll":
        losses = lse - (1.0 - smoothing) * picked - smoothing * mean + z_loss * lse.square()
        return losses, 1.0 + 2.0 * z_loss * lse, torch.full_like(picked, 1.0 - smoothing)
    losses, pull = lce_of_target(picked - lse, inputs.loss_type, inputs.parameter)
    losses = (1.0 - smoothing) * losses + smoothing * (lse - mean) + z_loss * lse.square()
    pull = (1.0 - smoothing) * pull
    return losses, pull + smoothing + 2.0 * z_loss * lse, pull
