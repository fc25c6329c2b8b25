"""Differential attention: two softmax maps of one pair of heads, subtracted."""

from __future__ import annotations

from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_whole
from ...runtime.dispatch import backend_for
from ...runtime.packing import check_cu_seqlens_form
from .checks import check_heads, check_rest, scale_of
from .inputs import DiffInputs
from .op import (
    COMBINE,
    OP,
    check_values,
    differential_attention_fwd,
    differential_combine_fwd,
    differential_maps_fwd,
    flash_attention_fwd,
)
from .reference import differential_attention_reference
from .torch import diff_combine, diff_lengths, diff_maps_varlen, diff_takes_flash


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
) -> Tensor:
    """Causal differential attention of packed documents (Ye et al. 2024, arXiv 2410.05258, eq. 1-3; no positions).

    Heads are striped as in Phi-4-mini-flash: head 2j+a of q is stripe a of pair j, which attends stripe a of key pair
    j // (Hq // Hkv) and reads that pair's two value heads side by side. Per pair: maps[0] - lambda_full * maps[1],
    RMSNorm over its 2d outputs, times (1 - lambda_init); the first d outputs become head 2j, the last d head 2j+1.

    Args:
        q: (Tq, Hq, d), Hq even.
        k, v: (Tk, Hkv, d), Hkv even and a divisor of Hq; same type and device as q.
        lambda_full: 0-d tensor, the weight of the second map; gets a gradient.
        subln_weight: (2d,), the RMSNorm's weight; gets a gradient.
        lambda_init: the layer's constant.
        cu_seqlens_q, cu_seqlens_k: int32 (S+1,), borders of the documents among queries and keys. A document with fewer
            queries than keys has its last tokens as queries (suffix, decoding); none are allowed. None: k as q.
        window: a query at position t sees keys t-window+1 .. t; None sees all keys up to t.
        scale: of the scores, 1/sqrt(d) if None.
        eps: of the RMSNorm.
        max_length_q, max_length_k: longest document or more, read on CUDA only; left out there, the host has to wait.

    Softmax sums and all after the maps are float32, or float64 when q is float64. Same input, same bits, in gradients
    too. Memory is linear in Tq and Tk.

    Returns:
        (Tq, Hq*d) in q's type, differentiable once.

    Raises:
        ValueError: shapes, types, devices or borders that don't fit, a document with more queries than keys, a window
            below 1, or a SAMBAY_KERNELS that can't be met.
        TypeError: an argument is not a tensor.
    """
    inputs = _inputs(q, k, v, cu_seqlens_q, cu_seqlens_k, window, scale)
    check_rest(q, lambda_full, subln_weight, lambda_init, eps)
    backend, rest = backend_for(OP, q), (lambda_full, subln_weight, float(lambda_init), float(eps))
    if backend == "reference":
        check_values(inputs)
        return recorded_in_own_types(
            lambda *args: differential_attention_reference(DiffInputs(*args[:7]), *args[7:]), *inputs, *rest
        )
    if backend == "cpp":
        return differential_attention_fwd(*inputs, *rest)[0]
    maps = _maps(inputs, backend, max_length_q, max_length_k)
    return (differential_combine_fwd if backend_for(COMBINE, maps) == "triton" else diff_combine)(maps, *rest)


def _maps(inputs: DiffInputs, backend: str, max_length_q: int | None, max_length_k: int | None) -> Tensor:
    """Both softmax maps of every pair of heads, (Tq, Hq, 2d)."""
    if backend == "torch" and diff_takes_flash(inputs.q):
        lengths = diff_lengths(inputs, max_length_q, max_length_k)
        return diff_maps_varlen(inputs, lengths, lambda *args: flash_attention_fwd(*args)[0])
    return differential_maps_fwd(*inputs, backend)[0]


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None,
    window: int | None,
    scale: float | None,
) -> DiffInputs:
    """What the maps are made of, checked, with the defaults filled in."""
    check_heads(q, k, v, 3)
    if window is not None:
        check_whole(OP, "window", window, least=1)  # the query itself
    if cu_seqlens_q is None:
        raise TypeError(f"{OP}: cu_seqlens_q must be an int32 tensor of shape (documents + 1,)")
    check_cu_seqlens_form(cu_seqlens_q, q.device, name="cu_seqlens_q")
    check_cu_seqlens_form(cu_seqlens_k, q.device, name="cu_seqlens_k")
    if cu_seqlens_k is None:
        if k.shape[0] != q.shape[0]:
            raise ValueError(f"{OP}: {q.shape[0]} queries but {k.shape[0]} keys: pass cu_seqlens_k too")
        cu_seqlens_k = cu_seqlens_q
    if cu_seqlens_k.shape != cu_seqlens_q.shape:
        raise ValueError(
            f"{OP}: cu_seqlens_q and cu_seqlens_k must name as many documents, got shapes "
            f"{tuple(cu_seqlens_q.shape)} and {tuple(cu_seqlens_k.shape)}"
        )
    return DiffInputs(q, k, v, cu_seqlens_q, cu_seqlens_k, window or 0, scale_of(q, scale))
