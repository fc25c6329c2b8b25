"""Linear cross entropy on a GPU: matrix products by the vendor's library, all between them by Triton kernels.

Two ways, as in torch.py. A sum goes by tokens (`lce_sum_triton`), three products in all: the logits of a chunk of
tokens are turned into their gradient while they are at hand, and the gradients of several chunks meet the weight
together, since each such meeting reads and writes the whole gradient of the weight. Losses by token go by vocabulary
(`lce_losses_triton`), and their backward pass computes the logits again. Both make the same logits by the same
products, so that both have the same losses, bit for bit.

Products of bfloat16 matrices are exact and summed in float32. The logits are float32; their gradient enters the
products in bfloat16, where hidden states and weight are: its rounding errors add up to a tenth of what the results' own
rounding is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import channel_block, launch
from .distill import LceTeacher
from .inputs import LceInputs
from .tally import LceTally, lce_note
from .terms import LceTerms, lce_terms
from .torch import (
    LCE_VOCABULARY_BLOCK,
    lce_blocks,
    lce_kept_type,
    lce_saved,
    lce_supervised,
    lce_teacher_at,
    lce_weights_at,
)

BLOCK = 1024
SCORED = 4
"""Chunks of tokens (chunk_size each) whose logits are made at once."""
MET = 16
"""Chunks whose logits' gradients, in half precision, meet the weight at once."""


def _halves(a: Tensor, b: Tensor) -> bool:
    """Whether a product takes the tensor cores' way: both bfloat16 (float16 would lose small gradients), on a GPU."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if _halves(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _slices(tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


def _chunks(tokens: int, vocabulary: int, chunk_size: int) -> Iterator[slice]:
    """As many tokens at once as keep the logits of a block below chunk_size * vocabulary values."""
    return _slices(tokens, max(1, chunk_size * vocabulary // min(vocabulary, LCE_VOCABULARY_BLOCK)))


def take_block(
    logits: Tensor,
    targets: Tensor,
    running: tuple[Tensor, ...],
    first: int,
    label_smoothing: float,
    with_moment: bool = False,
) -> None:
    """Take a block of logits (n, width) into the running maximum, sum, target's logit, logits' sum and, if asked, sum
    of x exp(x) with x = logit - maximum, (n,) each.

    Logits of -inf, which `take_named` leaves, take part in none of them.
    """
    from .triton_kernels import lce_forward_kernel

    launch(
        lce_forward_kernel, (logits.shape[0],), logits, targets, *running, first, logits.shape[1], logits.stride(0),
        BLOCK=channel_block(logits.shape[1], BLOCK), SMOOTHING=label_smoothing > 0, MOMENT=with_moment,
    )  # fmt: skip


def take_named(logits: Tensor, ids: Tensor, taken: Tensor, first: int) -> None:
    """Move the logits that a teacher names by `ids` (n, k) out of a block into `taken` (n, k)."""
    from .triton_kernels import lce_take_kernel

    count = ids.shape[1]
    grid = (logits.shape[0] if count else 0,)
    launch(
        lce_take_kernel, grid, logits, ids, taken, first, logits.shape[1], logits.stride(0), count,
        K=power_of_two(max(count, 1)),
    )  # fmt: skip


def gradient_of_block(logits: Tensor, targets: Tensor, terms: Tensor, first: int, out: Tensor) -> Tensor:
    """Write the gradient of a block of logits (n, width) to `out` (n, width); `terms` (5, n): as the kernel takes them.

    `out` is contiguous, of any type.
    """
    from .triton_kernels import lce_backward_kernel

    width = channel_block(logits.shape[1], BLOCK)
    launch(
        lce_backward_kernel, (logits.shape[0], -(-logits.shape[1] // width)), logits, targets, terms, terms.shape[1],
        out, first, logits.shape[1], logits.stride(0), BLOCK=width,
    )  # fmt: skip
    return out


def give_named(out: Tensor, ids: Tensor, values: Tensor, targets: Tensor, terms: Tensor, first: int) -> None:
    """Write the gradient of the logits that a teacher names into that of a block."""
    from .triton_kernels import lce_give_kernel

    count = ids.shape[1]
    grid = (out.shape[0] if count else 0,)
    launch(
        lce_give_kernel, grid, out, ids, values, targets, terms, terms.shape[1], first, out.shape[1], count,
        K=power_of_two(max(count, 1)),
    )  # fmt: skip


class _Seen:
    """What is known of n tokens' logits so far, block by block of the vocabulary."""

    def __init__(self, inputs: LceInputs, targets: Tensor, teacher: LceTeacher | None) -> None:
        self.inputs, self.targets, self.teacher = inputs, targets, teacher
        self.top = targets.new_full(targets.shape[:1], float("-inf"), dtype=torch.float32)
        self.sums = [torch.zeros_like(self.top) for _ in range(4)]  # total, picked, summed, moment
        self.named = None if teacher is None else torch.zeros_like(teacher.log_p)

    def take(self, logits: Tensor, tokens: slice, first: int, with_moment: bool) -> None:
        """A block of the logits of some of the tokens, which loses those that a teacher names."""
        if self.teacher is not None and self.named is not None:
            take_named(logits, self.teacher.ids[tokens], self.named[tokens], first)
        running = (self.top[tokens], *(x[tokens] for x in self.sums))
        take_block(logits, self.targets[tokens, 0], running, first, self.inputs.label_smoothing, with_moment)

    def terms(self, tally: LceTally | None) -> LceTerms:
        """Losses and gradients, once all blocks are taken."""
        total, picked, summed, moment = (x[:, None] for x in self.sums)
        top, teacher, named = self.top[:, None], self.teacher, self.named
        if teacher is not None and named is not None:
            picked = picked + (named * (teacher.ids == self.targets)).sum(1, keepdim=True)
            summed = summed + named.sum(1, keepdim=True)
        if tally is not None:
            lce_note(tally, (top, total, moment), picked, teacher, named)
        mean = summed / self.inputs.weight.shape[0]
        return lce_terms(self.inputs, total.log() + top, picked, mean, teacher, named)


def lce_losses_triton(inputs: LceInputs, tally: LceTally | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tokens, (T,) float32, zero at unsupervised ones, and what the backward pass needs."""
    hidden, weight = inputs.hidden, inputs.weight
    with torch.autocast(hidden.device.type, enabled=False):
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, weight.shape[0])
        rows = hidden.index_select(0, kept)
        seen = _Seen(inputs, targets, lce_teacher_at(inputs, kept, torch.float32))
        for first, block in lce_blocks(weight, weight.dtype):
            for chunk in _slices(kept.numel(), SCORED * inputs.chunk_size):
                seen.take(_product(rows[chunk], block.t()), chunk, first, tally is not None)
        return lce_saved(inputs, kept, seen.terms(tally))


def lce_sum_triton(
    inputs: LceInputs, want_hidden: bool, want_weight: bool, tally: LceTally | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """As `lce_sum`: the sum of the losses, its gradients to hidden (float32) and weight where wanted."""
    hidden, weight = inputs.hidden, inputs.weight
    with torch.autocast(hidden.device.type, enabled=False):
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, weight.shape[0])
        teacher, factors = lce_teacher_at(inputs, kept, torch.float32), lce_weights_at(inputs, kept, torch.float32)
        rows = hidden.index_select(0, kept)
        losses = torch.zeros_like(inputs.labels, dtype=torch.float32)
        of_rows = rows.new_zeros(rows.shape if want_hidden else (0,), dtype=torch.float32)
        of_weight = weight.new_zeros(weight.shape if want_weight else (0,), dtype=torch.float32)
        kind, at_once = (torch.bfloat16, MET) if _halves(hidden, weight) else (torch.float32, SCORED)
        for group in _slices(kept.numel(), at_once * inputs.chunk_size):
            of_logits = []
            if want_hidden or want_weight:
                blocks = lce_blocks(weight, weight.dtype)
                of_logits = [rows.new_empty(len(rows[group]), len(block), dtype=kind) for _, block in blocks]
            known = None if teacher is None else teacher.rows(group)
            factor = factors[group] if isinstance(factors, Tensor) else torch.ones_like(targets[group], dtype=kind)
            of_group = inputs._replace(hidden=rows[group])
            losses[kept[group]] = _score(of_group, targets[group], factor.float(), known, of_logits, tally)
            for (first, block), of_block in zip(lce_blocks(weight, weight.dtype), of_logits, strict=False):
                if want_hidden:
                    of_rows[group] += _product(of_block, block)
                if want_weight:
                    of_weight[first : first + block.shape[0]] += _product(of_block.t(), rows[group])
        if want_hidden:
            of_rows = torch.zeros_like(hidden, dtype=torch.float32).index_copy_(0, kept, of_rows)
        return losses.sum(), of_rows, of_weight.to(lce_kept_type(weight.dtype))


def _score(
    inputs: LceInputs,
    targets: Tensor,
    factor: Tensor,
    teacher: LceTeacher | None,
    of_logits: list[Tensor],
    tally: LceTally | None,
) -> Tensor:
    """Losses (n,) of n supervised tokens, inputs.hidden, times their weights `factor` (n, 1).

    The gradient of the logits goes to `of_logits`, (n, width) for each block of the vocabulary; if empty, nowhere.
    """
    losses = torch.empty_like(factor)
    for chunk in _slices(factor.shape[0], SCORED * inputs.chunk_size):
        seen = _Seen(inputs, targets[chunk], None if teacher is None else teacher.rows(chunk))
        held: list[tuple[int, Tensor]] = []
        for first, block in lce_blocks(inputs.weight, inputs.weight.dtype):
            logits = _product(inputs.hidden[chunk], block.t())
            seen.take(logits, slice(None), first, tally is not None)
            if of_logits:
                held.append((first, logits))
            del logits
        terms = seen.terms(tally)
        losses[chunk] = terms.losses * factor[chunk]
        numbers = torch.cat([factor[chunk], terms.norm, terms.slope, terms.share, terms.pull], 1).T.contiguous()
        for out in reversed(of_logits):  # from the last on, so that each block's logits go as its gradient is made
            first, logits = held.pop()
            gradient_of_block(logits, seen.targets, numbers, first, out[chunk])
            if seen.teacher is not None and terms.of_kept is not None:
                give_named(out[chunk], seen.teacher.ids, terms.of_kept.contiguous(), seen.targets, numbers, first)
            del logits
    return losses[:, 0]


def lce_losses_triton_backward(
    grad: Tensor, inputs: LceInputs, saved: Tensor, of_kept: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses) to hidden and weight, where wanted (else empty tensors); grad (T,)."""
    hidden, weight = inputs.hidden, inputs.weight
    with torch.autocast(hidden.device.type, enabled=False):
        vocabulary, kind = weight.shape[0], torch.bfloat16 if _halves(hidden, weight) else torch.float32
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, vocabulary)
        rows, target = hidden.index_select(0, kept), targets[:, 0]
        factor = grad.index_select(0, kept)[:, None].float() * lce_weights_at(inputs, kept, torch.float32)
        terms = torch.cat([factor.T, saved.index_select(1, kept)])
        ids = None if inputs.teacher_ids is None else inputs.teacher_ids.index_select(0, kept).long()
        named = of_kept.index_select(0, kept) if ids is not None else of_kept
        of_rows = rows.new_zeros(rows.shape if want_hidden else (0,), dtype=torch.float32)
        of_weight = torch.empty_like(weight) if want_weight else weight.new_empty(0)
        for first, block in lce_blocks(weight, weight.dtype):
            of_block = torch.zeros_like(block, dtype=torch.float32) if want_weight else block
            for chunk in _chunks(kept.numel(), vocabulary, inputs.chunk_size):
                logits, of_chunk = _product(rows[chunk], block.t()), terms[:, chunk].contiguous()
                of_logits = logits.new_empty(logits.shape, dtype=kind)
                gradient_of_block(logits, target[chunk], of_chunk, first, of_logits)
                if ids is not None:
                    give_named(of_logits, ids[chunk], named[chunk], target[chunk], of_chunk, first)
                del logits  # before the products' results are made
                if want_hidden:
                    of_rows[chunk] += _product(of_logits, block)
                if want_weight:
                    of_block += _product(of_logits.t(), rows[chunk])
            if want_weight:
                of_weight[first : first + block.shape[0]] = of_block
        if not want_hidden:
            return hidden.new_empty(0), of_weight
        return torch.zeros_like(hidden).index_copy_(0, kept, of_rows.to(hidden.dtype)), of_weight
