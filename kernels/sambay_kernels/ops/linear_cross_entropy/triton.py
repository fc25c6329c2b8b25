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

from ...triton.launch import channel_block, launch
from .inputs import LceInputs, LceTally
from .torch import LCE_VOCABULARY_BLOCK, lce_blocks, lce_note, lce_supervised

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
    of x exp(x) with x = logit - maximum, (n,) each."""
    from .triton_kernels import lce_forward_kernel

    launch(
        lce_forward_kernel, (logits.shape[0],), logits, targets, *running, first, logits.shape[1], logits.stride(0),
        BLOCK=channel_block(logits.shape[1], BLOCK), SMOOTHING=label_smoothing > 0, MOMENT=with_moment,
    )  # fmt: skip


def gradient_of_block(
    logits: Tensor,
    targets: Tensor,
    lse: Tensor,
    factor: Tensor,
    first: int,
    inputs: LceInputs,
    dtype: torch.dtype,
) -> Tensor:
    """The gradient of a block of logits (n, width) in `dtype`."""
    from .triton_kernels import lce_backward_kernel

    smoothing, width = inputs.label_smoothing, channel_block(logits.shape[1], BLOCK)
    out = logits.new_empty(logits.shape, dtype=dtype)
    launch(
        lce_backward_kernel, (logits.shape[0], -(-logits.shape[1] // width)), logits, targets, lse, factor, out, first,
        logits.shape[1], smoothing, inputs.z_loss, smoothing / inputs.weight.shape[0], logits.stride(0), BLOCK=width,
    )  # fmt: skip
    return out


def lce_losses_triton(inputs: LceInputs, tally: LceTally | None = None) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of every token, (T,) float32 each, zero at unsupervised ones."""
    hidden, weight, labels, ignore_index, label_smoothing, z_loss, chunk_size = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        vocabulary = weight.shape[0]
        kept, targets = lce_supervised(labels, ignore_index, vocabulary)
        rows, targets = hidden.index_select(0, kept), targets[:, 0]
        top = rows.new_full((kept.numel(),), float("-inf"), dtype=torch.float32)
        total, picked, summed, moment = (torch.zeros_like(top) for _ in range(4))
        for first, block in lce_blocks(weight, weight.dtype):
            for chunk in _chunks(kept.numel(), vocabulary, chunk_size):
                logits = _product(rows[chunk], block.t())
                running = (top[chunk], total[chunk], picked[chunk], summed[chunk], moment[chunk])
                take_block(logits, targets[chunk], running, first, label_smoothing, tally is not None)
        lse = total.log() + top
        if tally is not None:
            lce_note(tally, *(x[:, None] for x in (picked, top, total, moment)))
        losses = lse - (1.0 - label_smoothing) * picked - label_smoothing * summed / vocabulary + z_loss * lse.square()
        nothing = torch.zeros(labels.shape, dtype=torch.float32, device=hidden.device)
        return nothing.index_copy(0, kept, losses), nothing.index_copy(0, kept, lse)


def lce_losses_triton_backward(
    grad: Tensor, inputs: LceInputs, lse: Tensor, want_hidden: bool, want_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses) to hidden and weight, where wanted (else empty tensors); grad (T,)."""
    hidden, weight, labels, ignore_index, *_, chunk_size = inputs
    with torch.autocast(hidden.device.type, enabled=False):
        vocabulary, kind = weight.shape[0], torch.bfloat16 if _halves(hidden, weight) else torch.float32
        kept, targets = lce_supervised(labels, ignore_index, vocabulary)
        rows, targets = hidden.index_select(0, kept), targets[:, 0]
        lse, factor = (x.index_select(0, kept).float() for x in (lse, grad))
        of_rows = rows.new_zeros(rows.shape if want_hidden else (0,), dtype=torch.float32)
        of_weight = torch.empty_like(weight) if want_weight else weight.new_empty(0)
        for first, block in lce_blocks(weight, weight.dtype):
            of_block = torch.zeros_like(block, dtype=torch.float32) if want_weight else block
            for chunk in _chunks(kept.numel(), vocabulary, chunk_size):
                logits = _product(rows[chunk], block.t())
                of_logits = gradient_of_block(logits, targets[chunk], lse[chunk], factor[chunk], first, inputs, kind)
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
