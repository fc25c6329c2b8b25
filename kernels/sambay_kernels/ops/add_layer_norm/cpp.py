"""Residual addition and LayerNorm by the C++ extension."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_call import AddLayerNormBackward, AddLayerNormForward, call
from ...native.tensors import packed, pointer
from ...runtime.checks import compute_dtype


def _stored(dtype: torch.dtype, work: torch.dtype) -> torch.dtype:
    """What C++ reads or writes for rows of this type beside a residual stream of type `work`: bfloat16, or `work`."""
    return dtype if work == torch.float32 and dtype == torch.bfloat16 else work


def _is_read_rounded(total: Tensor, weight: Tensor) -> bool:
    """Whether the stream isn't read as it stands, in the type of the arithmetic: then torch adds and rounds it."""
    return not total.dtype == weight.dtype == compute_dtype(total)


def add_layer_norm_cpp(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """hidden + delta (None without delta), its LayerNorm, and the mean and 1 / deviation of every row (..., 2)."""
    work, total = compute_dtype(hidden), None
    if _is_read_rounded(hidden, weight):
        total = None if delta is None else (hidden + delta).to(hidden.dtype)
        delta, x = None, (hidden if total is None else total).to(weight.dtype).to(work).contiguous()
    else:
        x = hidden.contiguous()
    given = None if delta is None else packed(delta, _stored(delta.dtype, work))
    made = total if given is None else hidden.new_empty(hidden.shape)
    normed = hidden.new_empty(hidden.shape, dtype=_stored(out_dtype, work))
    stats = hidden.new_empty(*hidden.shape[:-1], 2, dtype=work)
    small = packed(weight, work), packed(bias, work)
    width = weight.shape[0]
    call("add_layer_norm_forward", work, AddLayerNormForward(
        x.numel() // width, width, given is not None and given.dtype != work, normed.dtype != work, eps,
        pointer(x), pointer(given), *map(pointer, small), None if given is None else pointer(made), pointer(normed),
        pointer(stats),
    ))  # fmt: skip
    return made, normed.to(out_dtype), stats


def add_layer_norm_cpp_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    read: Tensor,
    stats: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden; of delta, None where hidden's is it; of weight and bias, None where not wanted."""
    work, width = stats.dtype, weight.shape[0]
    x, up = read.to(weight.dtype).to(work).contiguous(), grad.to(_stored(grad.dtype, work)).contiguous()
    passed, small = packed(grad_total, work), packed(weight, work)
    found = read.new_empty(read.shape, dtype=work)
    narrow = hidden_dtype == work != _stored(delta_dtype, work)
    of_delta = read.new_empty(read.shape, dtype=delta_dtype) if narrow else None
    of_weight, of_bias = (read.new_empty(width, dtype=work) if want_weight else None for _ in range(2))
    call("add_layer_norm_backward", work, AddLayerNormBackward(
        x.numel() // width, width, narrow, up.dtype != work, pointer(up), pointer(passed), pointer(x), pointer(stats),
        pointer(small), pointer(found), *map(pointer, (of_delta, of_weight, of_bias)),
    ))  # fmt: skip
    if not narrow and delta_dtype != hidden_dtype:
        of_delta = found.to(delta_dtype)
    return found.to(hidden_dtype), of_delta, of_weight, of_bias
