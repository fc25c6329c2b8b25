"""Linear cross entropy on a GPU: matrix products by the vendor's library, all between them by Triton kernels.

By vocabulary, as `lce_losses` in torch.py: a block of the vocabulary meets many tokens, so that products are large
and nothing of the weight's size is kept or widened. Products of bfloat16 matrices are exact and summed in float32. The
logits are float32; their gradient enters the products in bfloat16, where hidden states and weight are: its rounding
errors add up to a tenth of what the results' own rounding is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import channel_block, launch
from .inputs import LceInputs
from .tally import LceTally, lce_note
from .terms import lce_terms
from .torch import LCE_VOCABULARY_BLOCK, lce_blocks, lce_saved, lce_supervised, lce_teacher_at, lce_weights_at

BLOCK = 1024


def _halves(a: Tensor, b: Tensor) -> bool:
    """Whether a product takes the tensor cores' way: both bfloat16 (float16 would lose small gradients), on a GPU."""
    return a.is_cuda and a.dtype == b.dtype == torch.bfloat16


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32."""
    if _halves(a, b):
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _chunks(tokens: int, vocabulary: int, chunk_size: int) -> Iterator[slice]:
    """As many tokens at once as keep the logits of a block below chunk_size * vocabulary values."""
    size = max(1, chunk_size * vocabulary // min(vocabulary, LCE_VOCABULARY_BLOCK))
    for start in range(0, tokens, size):
        yield slice(start, min(start + size, tokens))


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


def gradient_of_block(logits: Tensor, targets: Tensor, terms: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """The gradient of a block of logits (n, width) in `dtype`; `terms` (5, n): as the kernel takes them."""
    from .triton_kernels import lce_backward_kernel

    width = channel_block(logits.shape[1], BLOCK)
    out = logits.new_empty(logits.shape, dtype=dtype)
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


def lce_losses_triton(inputs: LceInputs, tally: LceTally | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses of all tokens, (T,) float32, zero at unsupervised ones, and what the backward pass needs."""
    hidden, weight = inputs.hidden, inputs.weight
    with torch.autocast(hidden.device.type, enabled=False):
        vocabulary = weight.shape[0]
        kept, targets = lce_supervised(inputs.labels, inputs.ignore_index, vocabulary)
        teacher = lce_teacher_at(inputs, kept, torch.float32)
        rows, target = hidden.index_select(0, kept), targets[:, 0]
        top = rows.new_full((kept.numel(),), float("-inf"), dtype=torch.float32)
        total, picked, summed, moment = (torch.zeros_like(top) for _ in range(4))
        named = None if teacher is None else torch.zeros_like(teacher.log_p)
        for first, block in lce_blocks(weight, weight.dtype):
            for chunk in _chunks(kept.numel(), vocabulary, inputs.chunk_size):
                logits = _product(rows[chunk], block.t())
                if teacher is not None and named is not None:
                    take_named(logits, teacher.ids[chunk], named[chunk], first)
                running = (top[chunk], total[chunk], picked[chunk], summed[chunk], moment[chunk])
                take_block(logits, target[chunk], running, first, inputs.label_smoothing, tally is not None)
        if teacher is not None and named is not None:
            picked = picked + (named * (teacher.ids == targets)).sum(1)
            summed = summed + named.sum(1)
        if tally is not None:
            lce_note(tally, (top[:, None], total[:, None], moment[:, None]), picked[:, None], teacher, named)
        rest, hit, mean = ((x[:, None]) for x in (total.log() + top, picked, summed / vocabulary))
        return lce_saved(inputs, kept, lce_terms(inputs, rest, hit, mean, teacher, named))


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
                of_logits = gradient_of_block(logits, target[chunk], of_chunk, first, kind)
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
