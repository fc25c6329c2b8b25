"""Losses that are functions of the target's log-probability, each with its derivative.

With p the target's probability and z the logits, d log p / dz = onehot(target) - softmax(z). So the gradient of any
loss f(log p) is that of the negative log likelihood, softmax - onehot, times one number for each token, -f'(log p): no
loss of the family costs more than a few operations a token.

The file imports torch alone, so that it can travel inside an exported model.
"""

from __future__ import annotations

import torch
from torch import Tensor

LCE_TYPES = ("nll", "dft", "power", "threshold")


def lce_of_target(log_p: Tensor, loss_type: str, parameter: float) -> tuple[Tensor, Tensor]:
    """Loss and -d loss / d log p of each token, in the shape of `log_p`.

    - `nll`: -log p; 1.
    - `dft`, dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629): -sg(p) log p, where sg lets no gradient through;
      p.
    - `power`, with alpha > 0 (Li et al. 2025, arXiv 2510.00526): (1 - p^alpha) / alpha; p^alpha. Alpha 1 is 1 - p,
      which has the gradient of `dft`; 10 is the paper's -p^10 up to a constant and a factor; towards 0 it is `nll`.
    - `threshold`, with a threshold q in (0, 1) (the same paper): -log p where p >= q, else 0; 1 where p >= q, else 0.
      That is, tokens that the model gives less than q say nothing in this step.
    """
    if loss_type == "dft":
        p = log_p.exp()
        return -p * log_p, p
    if loss_type == "power":
        return -torch.expm1(parameter * log_p) / parameter, (parameter * log_p).exp()
    if loss_type == "threshold":
        counts = (log_p.exp() >= parameter).to(log_p.dtype)
        return -log_p * counts, counts
    return -log_p, torch.ones_like(log_p)
