"""What the loss sees of each supervised token, from the sums over the vocabulary that it makes anyway.

With x = logit - top, where top is any bound of the logits: Z is the sum of exp(x), the moment that of x exp(x), and the
entropy is log Z - moment / Z. Accuracy and entropy are those of the student's whole distribution, whatever the loss.

The file imports torch and its neighbours alone, so that it can travel inside an exported model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .distill import LceTeacher

LCE_PIECE = 2048
LCE_LEAST = -1e4  # of x, where exp(x) is 0: nothing times infinity would be no number


class LceTally:
    """What forward passes saw of each supervised token, in the order of the labels; see `token_statistics`."""

    def __init__(self) -> None:
        self.correct: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def add(self, correct: Tensor, entropy: Tensor) -> None:
        """The next tokens: whether none is likelier than the label, (n,) bool, and the distribution's entropy, (n,)."""
        self.correct.append(correct)
        self.entropy.append(entropy)


def lce_exp_(shifted: Tensor, holes: bool) -> Tensor:
    """Overwrite x (n, V) with exp(x); their moment (n, 1). `holes`: some x are -inf."""
    moment = shifted.new_zeros(shifted.shape[0], 1)
    # In pieces, so that no second (n, V) is held.
    for piece in shifted.split(LCE_PIECE, 1):
        x = piece.clamp_min(LCE_LEAST) if holes else piece.clone()
        moment += torch.linalg.vecdot(piece.exp_(), x)[:, None]
    return moment


def lce_shift_moment(moment: Tensor, total: Tensor, top: Tensor, higher: Tensor) -> None:
    """Make the moment that goes with `total` and `top` that of a higher top, in place; (n, 1) each."""
    drop = (top - higher).clamp_min_(LCE_LEAST)
    moment.add_(total * drop).mul_(drop.exp())


def lce_note(
    tally: LceTally,
    sums: tuple[Tensor, Tensor, Tensor],
    picked: Tensor,
    teacher: LceTeacher | None = None,
    named: Tensor | None = None,
) -> None:
    """Note n tokens by `sums`: top, Z and moment, (n, 1) each.

    `picked`: (n, 1) the targets' logits. Tokens that a teacher names are not in the sums: their logits (n, k) are
    `named`.
    """
    top, total, moment = sums
    if teacher is not None and named is not None:
        known = named.masked_fill(teacher.ids < 0, float("-inf"))
        higher = torch.cat([top, known], 1).amax(1, keepdim=True)
        moment = moment.clone()
        lce_shift_moment(moment, total, top, higher)
        shifted = known - higher
        moment = moment + lce_exp_(shifted, holes=True)
        total, top = total * (top - higher).exp() + shifted.sum(1, keepdim=True), higher
    tally.add((picked >= top)[:, 0], (total.log() - moment / total)[:, 0])
