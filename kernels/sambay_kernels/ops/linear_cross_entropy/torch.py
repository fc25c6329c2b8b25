"""Cross entropy of a linear projection without its full logits, in plain torch.

The file imports torch and `inputs` alone and keeps its names to itself, so that it can travel inside an exported model.

Two ways through the (tokens x vocabulary) logits, both in float32 whatever the type of the inputs (float64 stays),
since a bfloat16 product here made the published pre-training diverge:

- by tokens (`lce_sum`): a chunk of tokens meets the whole vocabulary, its loss and gradients are done before the next
  chunk, so three products in all. The weight's gradient is kept from the forward to the backward pass.
- by vocabulary (`lce_losses`): a block of the vocabulary meets all tokens, with a running log-sum-exp; the backward
  pass computes the logits again, so four products. Nothing of the size of the weight is kept or widened: the gradient
  of a block is summed in float32 and rounded once. This is for weights that are large or not float32, and for losses
  by token, whose gradients the forward pass cannot know.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .inputs import LceInputs, LceTally

LCE_VOCABULARY_BLOCK = 8192
LCE_KEPT_GRADIENT_BYTES = 512 << 20  # a weight above this isn't worth holding its gradient for one product saved


def lce_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the logits and of all sums."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def lce_by_tokens(hidden: Tensor, weight: Tensor, reduction: str) -> bool:
    """Whether `lce_sum` is the better way: the loss is a sum, and the weight's gradient is cheap to keep."""
    size = weight.numel() * weight.element_size()
    return reduction == "sum" and weight.dtype == lce_type(hidden, weight) and size <= LCE_KEPT_GRADIENT_BYTES


def lce_supervised(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Positions of the supervised tokens and their labels (n, 1), checked to lie inside the vocabulary."""
    kept = (labels != ignore_index).nonzero()[:, 0]
    targets = labels.index_select(0, kept).long()[:, None]
    if kept.numel() and (int(targets.min()) < 0 or int(targets.max()) >= vocabulary):
        raise ValueError(
            f"linear_cross_entropy: labels must lie in 0 .. {vocabulary - 1} or be {ignore_index}, "
            f"got values from {int(targets.min())} to {int(targets.max())}"
        )
    return kept, targets


def lce_chunk(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float,
    z_loss: float,
    want_grad: bool,
    tally: LceTally | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of a chunk's logits (n, V), which are overwritten with the gradient of the losses' sum if wanted.

    `tally`: notes the accuracy and, if asked, the entropy.
    """
    picked = logits.gather(1, targets)
    mean = logits.mean(1, keepdim=True) if label_smoothing else 0.0
    top = logits.amax(1, keepdim=True)
    shifted = logits.sub_(top)
    logits = shifted.exp() if tally is not None and entropy else shifted.exp_()
    total = logits.sum(1, keepdim=True)
    lse = total.log() + top
    if tally is not None:
        lce_note(tally, picked, top, total, lce_dot(logits, shifted) if entropy else None)
    losses = lse - (1.0 - label_smoothing) * picked - label_smoothing * mean + z_loss * lse.square()
    if want_grad:
        logits.mul_((1.0 + 2.0 * z_loss * lse) / total)
        if label_smoothing:
            logits.sub_(label_smoothing / logits.shape[1])
        logits.scatter_add_(1, targets, torch.full_like(picked, label_smoothing - 1.0))
    return losses[:, 0], logits


def lce_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums of a * b along the rows, (n, 1)."""
    return torch.linalg.vecdot(a, b)[:, None]


def lce_note(tally: LceTally, picked: Tensor, top: Tensor, total: Tensor, moment: Tensor | None) -> None:
    """Accuracy and entropy, log Z - E[x], of tokens by their sums over the vocabulary, (n, 1) each.

    With x = logit - top: `total` is Z, the sum of exp(x), and `moment` that of x exp(x); None: the entropy comes later.
    """
    tally.correct.append((picked >= top)[:, 0])
    if moment is not None:
        tally.entropy.append((total.log() - moment / total)[:, 0])


def lce_sum(
    inputs: LceInputs, want_hidden: bool, want_weight: bool, tally: LceTally | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and, where wanted, its gradients to hidden and weight (else empty tensors)."""
    hidden, weight, labels, ignore_index, label_smoothing, z_loss, chunk_size = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        kept, targets = lce_supervised(labels, ignore_index, weight.shape[0])
        matrix = weight.to(wide)
        losses = hidden.new_empty(kept.shape, dtype=wide)
        grad_hidden = torch.zeros_like(hidden) if want_hidden else hidden.new_empty(0)
        grad_weight = torch.zeros_like(matrix) if want_weight else matrix.new_empty(0)
        # Of plain cross entropy the gradient to a hidden state h is E[w] - w_target, and h times that E[logit] - logit
        # of the target: with the loss it makes the entropy, for nothing.
        by_gradient = want_hidden and not label_smoothing and not z_loss
        for start in range(0, kept.numel(), chunk_size):
            chunk = slice(start, start + chunk_size)
            rows = hidden.index_select(0, kept[chunk]).to(wide)
            logits = rows @ matrix.T
            losses[chunk], logits = lce_chunk(
                logits, targets[chunk], label_smoothing, z_loss, want_hidden or want_weight, tally, not by_gradient
            )
            if want_hidden:
                grad_rows = logits @ matrix
                if tally is not None and by_gradient:
                    tally.entropy.append((losses[chunk] - lce_dot(rows, grad_rows)[:, 0]).clamp_min_(0.0))
                grad_hidden.index_copy_(0, kept[chunk], grad_rows.to(hidden.dtype))
            if want_weight:
                grad_weight.addmm_(logits.T, rows)
            del logits  # before the next chunk's are made
        return losses.sum(), grad_hidden, grad_weight.to(weight.dtype)


def lce_blocks(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary in blocks: first token id and rows in the wide type."""
    for start in range(0, weight.shape[0], LCE_VOCABULARY_BLOCK):
        yield start, weight[start : start + LCE_VOCABULARY_BLOCK].to(wide)


def lce_inside(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in the block that begins at `start` (0 if it lies elsewhere), and whether it lies there."""
    column = targets - start
    inside = (column >= 0) & (column < size)
    return column * inside, inside


def lce_shift_moment(moment: Tensor, total: Tensor, top: Tensor, higher: Tensor) -> None:
    """Make the sums of x exp(x), x = logit - top, that go with `total` and `top`, of a higher one; (n, 1) each."""
    drop = (top - higher).clamp_min_(-1e4)  # where exp is 0: nothing times infinity would be no number
    moment.add_(total * drop).mul_(drop.exp())


def lce_losses(inputs: LceInputs, tally: LceTally | None = None) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, (T,) each, zero at unsupervised ones."""
    hidden, weight, labels, ignore_index, label_smoothing, z_loss, chunk_size = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        kept, targets = lce_supervised(labels, ignore_index, weight.shape[0])
        top = hidden.new_full((kept.numel(), 1), float("-inf"), dtype=wide)
        total, picked, summed, moment = (torch.zeros_like(top) for _ in range(4))
        for first, block in lce_blocks(weight, wide):
            for start in range(0, kept.numel(), chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = hidden.index_select(0, kept[chunk]).to(wide) @ block.T
                column, inside = lce_inside(targets[chunk], first, block.shape[0])
                picked[chunk] += torch.where(inside, logits.gather(1, column), 0.0)
                if label_smoothing:
                    summed[chunk] += logits.sum(1, keepdim=True)
                higher = torch.maximum(top[chunk], logits.amax(1, keepdim=True))
                if tally is not None:
                    lce_shift_moment(moment[chunk], total[chunk], top[chunk], higher)
                total[chunk] *= (top[chunk] - higher).exp()
                top[chunk] = higher
                shifted = logits.sub_(higher)
                weights = shifted.exp_() if tally is None else shifted.exp()
                total[chunk] += weights.sum(1, keepdim=True)
                if tally is not None:
                    moment[chunk] += lce_dot(weights, shifted)
        lse = total.log() + top
        if tally is not None:
            lce_note(tally, picked, top, total, moment)
        mean = summed / weight.shape[0]
        losses = lse - (1.0 - label_smoothing) * picked - label_smoothing * mean + z_loss * lse.square()
        nothing = torch.zeros(labels.shape, dtype=wide, device=hidden.device)
        return nothing.index_copy(0, kept, losses[:, 0]), nothing.index_copy(0, kept, lse[:, 0])


def lce_losses_backward(
    grad: Tensor, inputs: LceInputs, lse: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses) to hidden and weight, where wanted (else empty tensors); grad (T,)."""
    hidden, weight, labels, ignore_index, label_smoothing, z_loss, chunk_size = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        kept, targets = lce_supervised(labels, ignore_index, weight.shape[0])
        lse, factor = (x.index_select(0, kept)[:, None].to(wide) for x in (lse, grad))
        slope = factor * (1.0 + 2.0 * z_loss * lse)
        grad_rows = torch.zeros(kept.numel() if want_hidden else 0, hidden.shape[1], dtype=wide, device=hidden.device)
        grad_weight = torch.empty_like(weight) if want_weight else weight.new_empty(0)
        for first, block in lce_blocks(weight, wide):
            grad_block = torch.zeros_like(block) if want_weight else block
            for start in range(0, kept.numel(), chunk_size):
                chunk = slice(start, start + chunk_size)
                rows = hidden.index_select(0, kept[chunk]).to(wide)
                logits = (rows @ block.T).sub_(lse[chunk]).exp_().mul_(slope[chunk])
                if label_smoothing:
                    logits.sub_(factor[chunk] * (label_smoothing / weight.shape[0]))
                column, inside = lce_inside(targets[chunk], first, block.shape[0])
                logits.scatter_add_(1, column, (label_smoothing - 1.0) * factor[chunk] * inside)
                if want_hidden:
                    grad_rows[chunk].addmm_(logits, block)
                if want_weight:
                    grad_block.addmm_(logits.T, rows)
            if want_weight:
                grad_weight[first : first + block.shape[0]] = grad_block
        if not want_hidden:
            return hidden.new_empty(0), grad_weight
        return torch.zeros_like(hidden).index_copy_(0, kept, grad_rows.to(hidden.dtype)), grad_weight


class LceSum(torch.autograd.Function):
    """:func:`lce_sum` for use without torch.library."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *plan: Any) -> Tensor:
        *rest, want_hidden, want_weight = plan
        loss, *found = lce_sum(LceInputs(hidden, weight, *rest), want_hidden, want_weight)
        ctx.save_for_backward(*found)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return (*(grad.to(x.dtype) * x if x.dim() == 2 else None for x in ctx.saved_tensors), *[None] * 7)


class LceLosses(torch.autograd.Function):
    """:func:`lce_losses` with its backward, for use without torch.library."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, *rest: Any) -> Tensor:
        losses, lse = lce_losses(LceInputs(hidden, weight, labels, *rest))
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.rest = rest
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        *tensors, lse = ctx.saved_tensors
        found = lce_losses_backward(grad, LceInputs(*tensors, *ctx.rest), lse, *ctx.needs_input_grad[:2])
        return (*(x if x.dim() == 2 else None for x in found), *[None] * 5)


def linear_cross_entropy_torch(
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
    """Cross entropy of `hidden @ weight.T`, as in `sambay_kernels.linear_cross_entropy`."""
    rest = (labels, ignore_index, label_smoothing, z_loss, chunk_size)
    if lce_by_tokens(hidden, weight, reduction):
        wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
        return LceSum.apply(hidden, weight, *rest, *wanted)
    losses = LceLosses.apply(hidden, weight, *rest)
    return losses.sum() if reduction == "sum" else losses
