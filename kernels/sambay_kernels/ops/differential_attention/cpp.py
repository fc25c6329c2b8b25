"""Differential attention by the C++ extension: the whole op in one call each way."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...native.cpp_call import AttentionArgs, AttentionBackward, AttentionForward, AttentionStep, call
from ...native.tensors import Heads, heads_of, packed, pointer
from ...runtime.checks import compute_dtype, stored_dtype
from .inputs import DiffInputs


def _read(value: Tensor, dtype: torch.dtype) -> Tensor:
    """(T, H, d) as C++ reads it: of this type, elements of a head side by side; tokens and heads any distance apart."""
    value = value.to(dtype)
    return value if value.stride(2) == 1 or value.shape[2] == 1 else value.contiguous()


class _Call:
    """The inputs in the form C++ reads, kept alive while it does."""

    def __init__(self, inputs: DiffInputs, lambda_full: Tensor, weight: Tensor, lambda_init: float, eps: float) -> None:
        q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale = inputs
        self.wide = compute_dtype(q)
        self.dtype = stored_dtype(q)
        self.heads = [_read(value, self.dtype) for value in (q, k, v)]
        self.others = [cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()]
        self.small = [packed(value, self.wide) for value in (lambda_full, weight)]
        self.args = AttentionArgs(
            cu_seqlens_q.numel() - 1, q.shape[1], k.shape[1], q.shape[2], *map(pointer, self.others), window, scale,
            lambda_init, eps, *map(heads_of, self.heads), *map(pointer, self.small),
        )  # fmt: skip


def differential_attention_cpp(
    inputs: DiffInputs, lambda_full: Tensor, subln_weight: Tensor, lambda_init: float, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """out (Tq, Hq*d), and for the backward: it before the norm (Tq, Hq*d) and the maps' softmax figures (Tq, Hq, 2)."""
    made, (tokens, heads, d) = _Call(inputs, lambda_full, subln_weight, lambda_init, eps), inputs.q.shape
    out, mixed = (inputs.q.new_empty(tokens, heads * d, dtype=made.dtype) for _ in range(2))
    softmax = inputs.q.new_empty(tokens, heads, 2, dtype=made.wide)
    call("attention_forward", made.dtype, AttentionForward(made.args, *map(pointer, (out, mixed, softmax))))
    return out.to(inputs.q.dtype), mixed.to(inputs.q.dtype), softmax


def differential_attention_cpp_backward(
    grad: Tensor, mixed: Tensor, softmax: Tensor, inputs: DiffInputs, *rest: Any
) -> list[Tensor]:
    """Gradients of q, k, v, lambda_full and subln_weight, each in its input's type."""
    made, wanted = _Call(inputs, *rest), [*inputs[:3], *rest[:2]]
    given = [packed(grad, made.dtype), packed(mixed, made.dtype), softmax.contiguous()]
    types = [made.dtype] * 3 + [made.wide] * 2
    found = [x.new_empty(x.shape, dtype=dtype) for x, dtype in zip(wanted, types, strict=True)]
    call("attention_backward", made.dtype, AttentionBackward(made.args, *map(pointer, (*given, *found))))
    return [x.to(like.dtype) for x, like in zip(found, wanted, strict=True)]


def _cached(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """Caches (B, H, T, d) as C++ reads them, both by the same places, and the places from one sequence to the next."""
    row, _, place, element = k.stride()
    if k.stride() != v.stride() or element != 1 or place <= 0 or row % place:
        k, v = (x.clone(memory_format=torch.contiguous_format) for x in (k, v))
        row, _, place, _ = k.stride()
    return k, v, row // place


def differential_attention_step_cpp(
    heads: tuple[Tensor, Tensor, Tensor],
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    key_mask: Tensor | None,
    scale: float,
    eps: float,
) -> Tensor:
    """One new token of each sequence, as in `sambay_kernels.differential_attention_step`; heads: q, k, v."""
    q, k, v = heads
    wide, dtype, (sequences, count, d) = compute_dtype(q), stored_dtype(q), q.shape
    read, (keys, values, row_keys) = _read(q, dtype), _cached(k.to(dtype), v.to(dtype))
    small = [packed(value, wide) for value in (lambda_full, subln_weight)]
    mask = key_mask if key_mask is None or key_mask.stride(1) == 1 else key_mask.contiguous()
    cache = [Heads(x.data_ptr(), x.stride(2), x.stride(1)) for x in (keys, values)]
    args = AttentionArgs(
        sequences, count, k.shape[1], d, None, None, 0, scale, lambda_init, eps, heads_of(read), *cache,
        *map(pointer, small),
    )  # fmt: skip
    out = q.new_empty(sequences, count * d, dtype=dtype)
    row = 0 if mask is None else mask.stride(0)
    call("attention_step", dtype, AttentionStep(args, k.shape[2], row_keys, pointer(mask), row, pointer(out)))
    return out.to(q.dtype)
