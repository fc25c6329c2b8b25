"""Divergence from a teacher of which only some tokens' probabilities are known, with its gradient to the logits.

Each token has outcomes: the ids that the teacher's k tokens name (the kept ones), and, with the tail `bucket`, one more
that stands for all other tokens of the vocabulary together, with the mass that is left (merging outcomes never raises
a divergence). With `renormalize` the kept ids are all there is, and both distributions are scaled to sum to 1 on them.

The temperature t then makes of each side's outcomes p_i the distribution p_i^(1/t) / sum_j p_j^(1/t). On kept ids that
is the softmax of their logits over t; of the tokens in the bucket only the sum is known, so the bucket is one outcome
before the temperature and after it. No factor t^2 is put in front.

The file imports torch alone, so that it can travel inside an exported model.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LCE_DIVERGENCES = ("forward", "reverse", "skewed")
LCE_TAILS = ("bucket", "renormalize")


class LceTeacher(NamedTuple):
    """What is known of the teacher at n tokens: ids (n, k), -1 where there is none, their log-probabilities (n, k),
    -inf there, and that of all other tokens together (n, 1)."""

    ids: Tensor
    log_p: Tensor
    tail: Tensor

    def rows(self, chunk: slice) -> LceTeacher:
        """The same of some of the tokens."""
        return LceTeacher(self.ids[chunk], self.log_p[chunk], self.tail[chunk])


def lce_teacher(
    ids: Tensor | None, log_probs: Tensor | None, kept: Tensor, vocabulary: int, wide: torch.dtype
) -> LceTeacher | None:
    """The teacher at the tokens `kept` (n,), checked; None where there is none at all.

    The mass outside of the kept ids is at least one rounding unit of the type that the log-probabilities come in: they
    can't tell less, and a reverse divergence from a mass of zero would be infinite.
    """
    if ids is None or log_probs is None:
        return None
    ids, found = ids.index_select(0, kept).long(), log_probs.index_select(0, kept)
    known, ordered = ids >= 0, ids.sort(1).values
    log_p = found.to(wide).masked_fill(~known, -math.inf)
    right = (~known | (log_p.isfinite() & (log_p <= 1e-3))).all()
    if not bool(((ids >= -1) & (ids < vocabulary)).all()):
        raise ValueError(
            f"linear_cross_entropy: teacher_ids must lie in 0 .. {vocabulary - 1}, or be -1 where there is none"
        )
    if bool(((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any()):
        raise ValueError("linear_cross_entropy: teacher_ids name a token twice at one position")
    if not bool(right):
        raise ValueError("linear_cross_entropy: teacher_logprobs must be log-probabilities: finite, 0 at most")
    least = torch.finfo(found.dtype).eps
    tail = (1.0 - log_p.exp().sum(1, keepdim=True)).clamp(min=least).log()
    return LceTeacher(ids, log_p, tail)


def lce_divergence(
    logits: Tensor, rest: Tensor, teacher: LceTeacher, divergence: str, skew: float, tail: str, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Divergence (n, 1) and its gradients to the kept ids' logits (n, k) and to the others' log-sum-exp (n, 1).

    With p the teacher's outcomes and q the student's:

    - `forward`: KL(p || q), which asks the student to cover all that the teacher says.
    - `reverse`: KL(q || p), which asks it to say nothing that the teacher doesn't.
    - `skewed`: KL(p || a p + (1 - a) q) with a = skew (DistiLLM, Ko et al. 2024, arXiv 2402.03898), whose gradient
      stays bounded where q is tiny.

    Zero where the teacher is silent.

    Args:
        logits: (n, k) at the teacher's ids, any finite value where there is none.
        rest: (n, 1), log-sum-exp of all other tokens' logits; -inf where there are no others.
    """
    silent = (teacher.ids < 0).all(1, keepdim=True)
    bucket = (rest == -math.inf) | (tail != "bucket")
    student = torch.cat([logits.masked_fill(teacher.ids < 0, -math.inf), rest.masked_fill(bucket, -math.inf)], 1)
    known = torch.cat([teacher.log_p, teacher.tail.masked_fill(bucket, -math.inf)], 1)
    q, p = (torch.log_softmax(x.masked_fill(silent, 0.0) / temperature, 1) for x in (student, known))
    absent = (student == -math.inf) & ~silent
    if divergence == "reverse":
        ratio = (q - p).masked_fill(absent, 0.0)
        loss = (q.exp() * ratio).sum(1, keepdim=True)
        slope = q.exp() * (ratio - loss)
    elif divergence == "skewed" and skew:
        mixed = torch.logaddexp(p + math.log(skew), q + math.log1p(-skew))
        loss = (p.exp() * (p - mixed).masked_fill(absent, 0.0)).sum(1, keepdim=True)
        pulled = (p + q + math.log1p(-skew) - mixed).masked_fill(absent, -math.inf).exp()
        slope = q.exp() * pulled.sum(1, keepdim=True) - pulled
    else:
        loss = (p.exp() * (p - q).masked_fill(absent, 0.0)).sum(1, keepdim=True)
        slope = q.exp() - p.exp()
    slope = slope.masked_fill(silent, 0.0) / temperature
    return loss.masked_fill(silent, 0.0), slope[:, :-1], slope[:, -1:]
