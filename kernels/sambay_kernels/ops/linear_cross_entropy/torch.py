"""Cross entropy of a linear projection without its full logits, in plain torch.

The file imports torch and its neighbours alone and keeps its names to itself, so that it can travel inside an exported
model.

Two ways through the (tokens x vocabulary) logits, which are float32 whatever the type of the inputs (float64 stays),
since a bfloat16 product here made the published pre-training diverge:

- by tokens (`lce_sum`): a chunk of tokens meets the whole vocabulary, its loss and gradients are done before the next
  chunk, so three products in all. The weight's gradient is kept from the forward to the backward pass. Autocast to
  bfloat16 holds for the two products that make gradients, as for those of any linear layer.
- by vocabulary (`lce_losses`): a block of the vocabulary meets all tokens, with a running log-sum-exp; the backward
  pass computes the logits again, so four products. Nothing of the size of the weight is kept or widened: the gradient
  of a block is summed in float32 and rounded once. This is for weights that are large or not float32, and for losses
  by token, whose gradients the forward pass cannot know.

Either way what is made of each token's log-sum-exp and target's logit (and of the logits that a teacher names) is
`terms`: a handful of numbers a token, whatever the loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .distill import LceTeacher, lce_teacher
from .inputs import LceInputs
from .tally import LceTally, lce_exp_, lce_note, lce_shift_moment
from .terms import LceTerms, lce_terms

LCE_VOCABULARY_BLOCK = 8192
LCE_KEPT_GRADIENT_BYTES = 512 << 20  # a weight above this isn't worth holding its gradient for one product saved


def lce_type(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type of the logits and of all sums."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def lce_rounds(hidden: Tensor) -> bool:
    """Whether autocast asks for products of bfloat16 (of float16 small gradients would be lost)."""
    kind = hidden.device.type
    asked = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return asked and torch.get_autocast_dtype(kind) == torch.bfloat16


def lce_kept_type(dtype: torch.dtype) -> torch.dtype:
    """The type in which a sum's gradient waits for the backward pass, which scales it: one of float32's range."""
    return torch.float32 if dtype == torch.float16 else dtype


def lce_scaled(kept: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """A kept gradient times the upstream one, rounded once; in pieces, so that no second wide one is held."""
    if kept.dtype == dtype and dtype in (torch.float32, torch.float64):
        return kept * grad.to(dtype)
    out = torch.empty_like(kept, dtype=dtype)
    for first in range(0, kept.shape[0], LCE_VOCABULARY_BLOCK):
        rows = slice(first, first + LCE_VOCABULARY_BLOCK)
        out[rows] = kept[rows].to(grad.dtype) * grad
    return out


def lce_once() -> None:
    """Refuse a second derivative: the gradients came with the loss, and would pass for constants in it."""
    if torch.is_grad_enabled():  # what create_graph makes of a backward pass
        raise RuntimeError("linear_cross_entropy is differentiable once: leave create_graph out")


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


def lce_teacher_at(inputs: LceInputs, kept: Tensor, wide: torch.dtype) -> LceTeacher | None:
    """The teacher at the supervised tokens."""
    return lce_teacher(inputs.teacher_ids, inputs.teacher_logprobs, kept, inputs.weight.shape[0], wide)


def lce_weights_at(inputs: LceInputs, kept: Tensor, wide: torch.dtype) -> Tensor | float:
    """The weights (n, 1) of the supervised tokens, checked; 1.0 where none are given."""
    if inputs.weights is None:
        return 1.0
    weights = inputs.weights.index_select(0, kept)[:, None].to(wide)
    if not bool((weights.isfinite() & (weights >= 0)).all()):
        raise ValueError("linear_cross_entropy: weights must be finite and at least 0")
    return weights


def lce_inside(targets: Tensor, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in the block that begins at `start` (0 if it lies elsewhere), and whether it lies there."""
    column = targets - start
    inside = (column >= 0) & (column < size)
    return column * inside, inside


def lce_take(logits: Tensor, ids: Tensor, start: int) -> Tensor:
    """The logits (n, k) of `ids` in a block, zero where they lie elsewhere; in the block they become -inf."""
    column, inside = lce_inside(ids, start, logits.shape[1])
    taken = logits.gather(1, column).masked_fill(~inside, 0.0)
    logits.scatter_add_(1, column, torch.zeros_like(taken).masked_fill(inside, float("-inf")))
    return taken


def lce_give(logits: Tensor, ids: Tensor, values: Tensor, start: int) -> None:
    """Add `values` (n, k) to the columns of `ids` that lie in a block."""
    column, inside = lce_inside(ids, start, logits.shape[1])
    logits.scatter_add_(1, column, values * inside)


def lce_chunk(
    inputs: LceInputs,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | float,
    teacher: LceTeacher | None,
    want_grad: bool,
    tally: LceTally | None = None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """Losses (n,) of a chunk's logits (n, V), which are overwritten with the gradient of the losses' sum if wanted.

    `tally`: notes the accuracy and, if asked, the entropy.
    """
    picked = logits.gather(1, targets)
    mean = logits.mean(1, keepdim=True) if inputs.label_smoothing else 0.0
    top = logits.amax(1, keepdim=True)
    named = None if teacher is None else lce_take(logits, teacher.ids, 0)
    logits.sub_(top)
    moment = lce_exp_(logits, holes=teacher is not None) if tally is not None and entropy else None
    total = (logits if moment is not None else logits.exp_()).sum(1, keepdim=True)
    if tally is not None and moment is not None:
        lce_note(tally, (top, total, moment), picked, teacher, named)
    elif tally is not None:
        tally.correct.append((picked >= top)[:, 0])
    terms = lce_terms(inputs, total.log() + top, picked, mean, teacher, named)
    if want_grad:
        # Where a teacher names the whole vocabulary nothing is left, and the slope is zero.
        logits.mul_(terms.slope * weights / (total if teacher is None else total.masked_fill(total == 0, 1.0)))
        if inputs.label_smoothing:
            logits.sub_(terms.share * weights)
        logits.scatter_add_(1, targets, -terms.pull * weights)
        if teacher is not None and terms.of_kept is not None:
            lce_give(logits, teacher.ids, terms.of_kept * weights, 0)
    return (terms.losses * weights)[:, 0], logits


def lce_plain(inputs: LceInputs) -> bool:
    """Whether each token's gradient is that of plain cross entropy."""
    more = inputs.weights is not None or inputs.teacher_ids is not None
    return inputs.loss_type == "nll" and not (inputs.label_smoothing or inputs.z_loss or more)


def lce_sum(
    inputs: LceInputs, want_hidden: bool, want_weight: bool, tally: LceTally | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses and, where wanted, its gradients to hidden, in the wide type, and weight (else empty)."""
    hidden, weight, chunk_size = inputs.hidden, inputs.weight, inputs.chunk_size
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        wanted = want_hidden or want_weight
        narrow = torch.bfloat16 if inputs.rounded and wanted and wide == torch.float32 else wide
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, weight.shape[0])
        teacher, weights = lce_teacher_at(inputs, kept, wide), lce_weights_at(inputs, kept, wide)
        matrix = weight.to(wide)
        factor = weight.to(narrow)
        losses = hidden.new_empty(kept.shape, dtype=wide)
        grad_hidden = torch.zeros_like(hidden, dtype=wide) if want_hidden else losses.new_empty(0)
        grad_weight = torch.zeros_like(matrix) if want_weight else matrix.new_empty(0)
        # Of plain cross entropy the gradient to a hidden state h is E[w] - w_target, and h times that E[logit] - logit
        # of the target: with the loss it makes the entropy, for nothing, where the gradient isn't rounded.
        by_gradient = want_hidden and lce_plain(inputs) and narrow == wide
        for start in range(0, kept.numel(), chunk_size):
            chunk = slice(start, start + chunk_size)
            rows = hidden.index_select(0, kept[chunk]).to(wide)
            logits = rows @ matrix.T
            of_chunk = weights if isinstance(weights, float) else weights[chunk]
            known = None if teacher is None else teacher.rows(chunk)
            losses[chunk], logits = lce_chunk(
                inputs, logits, targets[chunk], of_chunk, known, wanted, tally, not by_gradient
            )
            slopes = logits.to(narrow)
            if want_hidden:
                grad_rows = slopes @ factor
                if tally is not None and by_gradient:
                    tally.entropy.append((losses[chunk] - torch.linalg.vecdot(rows, grad_rows)).clamp_min_(0.0))
                grad_hidden.index_copy_(0, kept[chunk], grad_rows.to(wide))
            if want_weight and narrow == wide:
                grad_weight.addmm_(slopes.T, rows)
            elif want_weight:
                grad_weight.add_(slopes.T @ rows.to(narrow))
            del slopes, logits  # before the next chunk's are made
        return losses.sum(), grad_hidden, grad_weight.to(lce_kept_type(weight.dtype))


def lce_blocks(weight: Tensor, wide: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """The vocabulary in blocks: first token id and rows in the wide type."""
    for start in range(0, weight.shape[0], LCE_VOCABULARY_BLOCK):
        yield start, weight[start : start + LCE_VOCABULARY_BLOCK].to(wide)


def lce_saved(inputs: LceInputs, kept: Tensor, terms: LceTerms) -> tuple[Tensor, Tensor, Tensor]:
    """Losses with their weights (T,); norm, slope, share and pull (4, T); and `of_kept` (T, k) or empty.

    All are zero at tokens without a label.
    """
    tokens, wide = inputs.labels.shape[0], terms.losses.dtype
    losses = terms.losses * lce_weights_at(inputs, kept, wide)
    numbers = torch.cat([losses, terms.norm, terms.slope, terms.share, terms.pull], 1)
    spread = numbers.new_zeros(5, tokens).index_copy(1, kept, numbers.T)
    if inputs.teacher_ids is None or terms.of_kept is None:
        return spread[0].clone(), spread[1:].clone(), numbers.new_empty(0)
    of_kept = numbers.new_zeros(inputs.teacher_ids.shape).index_copy(0, kept, terms.of_kept)
    return spread[0].clone(), spread[1:].clone(), of_kept


def lce_terms_at(inputs: LceInputs, saved: Tensor, of_kept: Tensor, grad: Tensor, kept: Tensor) -> LceTerms:
    """The terms of the supervised tokens as `lce_saved` left them, times the upstream gradient and the weights."""
    wide = saved.dtype
    factor = grad.index_select(0, kept)[:, None].to(wide) * lce_weights_at(inputs, kept, wide)
    norm, slope, share, pull = (x.index_select(0, kept)[:, None] for x in saved)
    named = None if inputs.teacher_ids is None else of_kept.index_select(0, kept) * factor
    return LceTerms(factor, norm, factor * slope, factor * share, factor * pull, named)


def lce_losses(inputs: LceInputs, tally: LceTally | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tokens, (T,), zero at unsupervised ones, and what the backward pass needs: see `lce_saved`."""
    hidden, weight, chunk_size = inputs.hidden, inputs.weight, inputs.chunk_size
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, weight.shape[0])
        teacher = lce_teacher_at(inputs, kept, wide)
        top = hidden.new_full((kept.numel(), 1), float("-inf"), dtype=wide)
        total, picked, summed, moment = (torch.zeros_like(top) for _ in range(4))
        named = None if teacher is None else torch.zeros_like(teacher.log_p)
        for first, block in lce_blocks(weight, wide):
            for start in range(0, kept.numel(), chunk_size):
                chunk = slice(start, start + chunk_size)
                logits = hidden.index_select(0, kept[chunk]).to(wide) @ block.T
                column, inside = lce_inside(targets[chunk], first, block.shape[0])
                picked[chunk] += torch.where(inside, logits.gather(1, column), 0.0)
                if inputs.label_smoothing:
                    summed[chunk] += logits.sum(1, keepdim=True)
                higher = torch.maximum(top[chunk], logits.amax(1, keepdim=True))
                if teacher is not None and named is not None:
                    named[chunk] += lce_take(logits, teacher.ids[chunk], first)
                logits.sub_(higher)
                if tally is not None:
                    lce_shift_moment(moment[chunk], total[chunk], top[chunk], higher)
                    moment[chunk] += lce_exp_(logits, holes=teacher is not None)
                else:
                    logits.exp_()
                total[chunk] *= (top[chunk] - higher).exp()
                top[chunk] = higher
                total[chunk] += logits.sum(1, keepdim=True)
        if tally is not None:
            lce_note(tally, (top, total, moment), picked, teacher, named)
        mean = summed / weight.shape[0]
        return lce_saved(inputs, kept, lce_terms(inputs, total.log() + top, picked, mean, teacher, named))


def lce_losses_backward(
    grad: Tensor, inputs: LceInputs, saved: Tensor, of_kept: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses) to hidden and weight, where wanted (else empty tensors); grad (T,)."""
    hidden, weight, chunk_size = inputs.hidden, inputs.weight, inputs.chunk_size
    with torch.autocast(hidden.device.type, enabled=False):
        wide = lce_type(hidden, weight)
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, weight.shape[0])
        terms = lce_terms_at(inputs, saved, of_kept, grad, kept)
        ids = None if inputs.teacher_ids is None else inputs.teacher_ids.index_select(0, kept).long()
        grad_rows = torch.zeros(kept.numel() if want_hidden else 0, hidden.shape[1], dtype=wide, device=hidden.device)
        grad_weight = torch.empty_like(weight) if want_weight else weight.new_empty(0)
        for first, block in lce_blocks(weight, wide):
            grad_block = torch.zeros_like(block) if want_weight else block
            for start in range(0, kept.numel(), chunk_size):
                chunk = slice(start, start + chunk_size)
                rows = hidden.index_select(0, kept[chunk]).to(wide)
                logits = rows @ block.T
                if ids is not None:
                    lce_take(logits, ids[chunk], first)
                logits.sub_(terms.norm[chunk]).exp_().mul_(terms.slope[chunk])
                if inputs.label_smoothing:
                    logits.sub_(terms.share[chunk])
                lce_give(logits, targets[chunk], -terms.pull[chunk], first)
                if ids is not None and terms.of_kept is not None:
                    lce_give(logits, ids[chunk], terms.of_kept[chunk], first)
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
        ctx.types, ctx.others = (hidden.dtype, weight.dtype), len(plan)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        lce_once()
        pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
        found = (lce_scaled(x, grad, dtype) if x.dim() == 2 else None for x, dtype in pairs)
        return (*found, *[None] * ctx.others)


class LceLosses(torch.autograd.Function):
    """:func:`lce_losses` with its backward, for use without torch.library."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        inputs = LceInputs(hidden, weight, *rest)
        losses, saved, of_kept = lce_losses(inputs)
        ctx.save_for_backward(hidden, weight, saved, of_kept)
        ctx.rest = rest
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        hidden, weight, saved, of_kept = ctx.saved_tensors
        inputs = LceInputs(hidden, weight, *ctx.rest)
        found = lce_losses_backward(grad, inputs, saved, of_kept, *ctx.needs_input_grad[:2])
        return (*(x if x.dim() == 2 else None for x in found), *[None] * len(ctx.rest))


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
    """Cross entropy of `hidden @ weight.T`, as in `sambay_kernels.linear_cross_entropy`."""
    parameter = next((value for value in (alpha, threshold) if value is not None), 0.0)
    teacher = (teacher_ids, teacher_logprobs) if distill_weight else (None, None)
    own = (ignore_index, label_smoothing, z_loss, chunk_size, weights, loss_type, parameter)
    rest = (labels, *own, *teacher, distill_weight, divergence, skew, tail, temperature, lce_rounds(hidden))
    if lce_by_tokens(hidden, weight, reduction):
        wanted = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
        return LceSum.apply(hidden, weight, *rest, *wanted)
    losses = LceLosses.apply(hidden, weight, *rest)
    return losses.sum() if reduction == "sum" else losses
