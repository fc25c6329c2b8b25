"""Losses of a linear projection (a language model's head) without its full logits: cross entropy and its family.

Per token, with p the label's probability: (1 - s) * f(p) + s * mean over the vocabulary of -log p, with
s = label_smoothing as in torch.nn.functional.cross_entropy, plus z_loss * logsumexp(logits)^2 (PaLM, Chowdhery et al.
2022, section 5), all times the token's weight. f is -log p for the loss type `nll`, which is cross entropy; the other
types are functions of p too, and cost no more:

- `dft`: -sg(p) log p, where sg lets no gradient through (arXiv 2508.05629).
- `power`, with `alpha`: (1 - p^alpha) / alpha (arXiv 2510.00526): 1 - p for 1, nll towards 0.
- `threshold`, with `threshold`: -log p where p >= threshold, else 0 (the same paper).

The gradient to the logits of f is (softmax - onehot) * -df/dlog p: p, p^alpha, and 1 or 0.

With a teacher the loss of a token of which it knows something is (1 - w) times the above plus w times a divergence
between the outcomes that the teacher knows: `forward` KL(p || q), `reverse` KL(q || p), or `skewed`
KL(p || skew * p + (1 - skew) * q) (arXiv 2402.03898), p the teacher's and q the student's. Outcomes are the ids at that
position and, for the tail `bucket`, one more for all other tokens together; with `renormalize` the ids are all there
is, and both sides sum to 1 on them. A temperature t makes each side's outcomes p_i proportional to p_i^(1/t), the
bucket being one of them.

Logits, softmax and all sums are float32 whatever the inputs' type and whatever autocast says (float64 if an input is).
On a GPU, autocast to bfloat16 rounds hidden and weight as for any linear layer; their products are then exact and
summed in float32. Elsewhere it rounds what the two products of a sum's gradients multiply, and the logits are made of
what was given. The gradients of a sum are computed with the loss, three products in all, on a GPU, and elsewhere where
weight is float32 and at most 512 MiB; the backward pass scales them. Else it is the backward pass that computes them,
block by block and from logits that are made again, and nothing of the weight's size is kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_leading, check_optional, check_real, check_tensor, check_whole, needs_grad
from ...runtime.dispatch import backend_for
from .checks import Teacher, check_loss_type, check_teacher
from .inputs import LceInputs
from .op import OP, linear_cross_entropy_fwd, linear_cross_entropy_sum
from .reference import linear_cross_entropy_reference
from .statistics import open_tally
from .torch import lce_by_tokens, lce_rounds, lce_supervised, lce_teacher_at

LABEL_TYPES = (torch.int64, torch.int32)


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
    weights: Tensor | None = None,
    loss_type: str = "nll",
    alpha: float | None = None,
    threshold: float | None = None,
    teacher_ids: Tensor | None = None,
    teacher_logprobs: Tensor | None = None,
    distill_weight: float = 0.0,
    divergence: str = "forward",
    skew: float = 0.1,
    tail: str = "bucket",
    temperature: float = 1.0,
) -> Tensor:
    """Losses of the logits hidden @ weight.T against labels, over supervised tokens alone; see the top of the file.

    Args:
        hidden: (T, H); weight: (V, H), of any type; labels: (T,) int64 or int32, already aligned with hidden.
        label_smoothing: in [0, 1]; z_loss: at least 0; alpha: above 0; threshold: between 0 and 1.
        reduction: "sum", or "none" for the losses by token, zero where there is no label.
        chunk_size: tokens scored at once, of which chunk_size * V logits are in memory (on a GPU 4 times as many, and
            the gradients of 16 times as many in bfloat16); it changes rounding only.
        weights: (T,) floats, finite and at least 0; None: 1. They get no gradient.
        loss_type: "nll", "dft", "power" (with alpha) or "threshold" (with threshold).
        teacher_ids: (T, k) int64 or int32, different ids at one position; -1 where the teacher says nothing.
        teacher_logprobs: (T, k) floats, their natural log-probabilities; those beside an id of -1 aren't read.
        distill_weight: w, in [0, 1]; 0: the teacher isn't read. divergence, skew in [0, 1), tail, temperature: its own.
    Returns:
        A 0-d tensor, or (T,) for "none", float32 (float64 if an input is), differentiable once.
    Raises:
        ValueError: shapes, types, devices, a label outside the vocabulary, an option out of its range.
        TypeError: an argument is not a tensor.
    """
    check_leading(OP, "hidden", hidden, 2)
    check_leading(OP, "weight", weight, 2)
    teacher = Teacher(teacher_ids, teacher_logprobs, distill_weight, divergence, skew, tail, temperature)
    parameter = check_loss_type(loss_type, alpha, threshold)
    check_teacher(hidden, teacher)
    own = (ignore_index, label_smoothing, z_loss, chunk_size, weights, loss_type, parameter)
    inputs = LceInputs(hidden, weight, labels, *own, *teacher.read())
    _check(inputs, reduction)
    inputs = inputs._replace(label_smoothing=float(label_smoothing), z_loss=float(z_loss))
    return _computed(inputs, reduction)


def _computed(inputs: LceInputs, reduction: str) -> Tensor:
    hidden = inputs.hidden
    backend = backend_for(OP, hidden)
    if backend == "reference":
        kept, _ = lce_supervised(inputs.labels, inputs.ignore_index, inputs.weight.shape[0])  # checks their values
        lce_teacher_at(inputs, kept, hidden.dtype)
        tallies = [open_tally()]  # the backward pass computes the function again, and has nothing to note

        def defined(*args: Any) -> Tensor:
            return linear_cross_entropy_reference(LceInputs(*args), reduction, tallies.pop() if tallies else None)

        return recorded_in_own_types(defined, *inputs)
    if lce_rounds(hidden):
        inputs = inputs._replace(rounded=True)
        if hidden.is_cuda:
            inputs = inputs._replace(hidden=hidden.bfloat16(), weight=inputs.weight.bfloat16())
    if reduction == "sum" and (backend == "triton" or lce_by_tokens(inputs.hidden, inputs.weight, reduction)):
        return linear_cross_entropy_sum(*inputs, backend, needs_grad(inputs.hidden), needs_grad(inputs.weight))[0]
    losses = linear_cross_entropy_fwd(*inputs, backend)[0]
    return losses.sum() if reduction == "sum" else losses


def _check(inputs: LceInputs, reduction: str) -> None:
    hidden, weight = inputs.hidden, inputs.weight
    check_tensor(OP, "weight", weight, (weight.shape[0], hidden.shape[1]), hidden.device)
    _check_labels(hidden, inputs.labels)
    check_whole(OP, "ignore_index", inputs.ignore_index)
    check_whole(OP, "chunk_size", inputs.chunk_size, least=1)
    check_real(OP, "label_smoothing", inputs.label_smoothing, least=0.0, most=1.0)
    check_real(OP, "z_loss", inputs.z_loss, least=0.0)
    check_optional(OP, "weights", inputs.weights, tuple(hidden.shape[:1]), hidden.device)
    if reduction not in ("sum", "none"):
        raise ValueError(f"{OP}: reduction must be 'sum' or 'none', got {reduction!r}")


def _check_labels(hidden: Tensor, labels: Tensor) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{OP}: labels must be a tensor, got {type(labels)}")
    if labels.dtype not in LABEL_TYPES:
        raise ValueError(f"{OP}: labels must be int64 or int32, got {labels.dtype}")
    if labels.shape != hidden.shape[:1]:
        raise ValueError(f"{OP}: labels must have shape {tuple(hidden.shape[:1])}, got {tuple(labels.shape)}")
    if labels.device != hidden.device:
        raise ValueError(f"{OP}: labels are on {labels.device} but hidden is on {hidden.device}")
