"""The selective scan as a pair of torch.library ops: forward and backward, with fakes, autograd and FLOP formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import compute_dtype
from ..dispatch import register
from ..packing import check_cu_seqlens_values, document_count
from ..recompute import autograd_inside_op
from .reference import selective_scan_reference
from .torch_backend import SCAN_BLOCK_ELEMENTS, selective_scan_torch

OP = "selective_scan"
FORMS: dict[str, Callable[..., Any]] = {"torch": selective_scan_torch, "reference": selective_scan_reference}

register(OP, "torch")
register(OP, "reference")


def checkpoint_rows(total: int, documents: int, backend: str, save: bool) -> int:
    """Rows of the third output: states kept for the backward pass. The differentiable forms keep none."""
    return 0


@torch.library.custom_op("sambay_kernels::selective_scan_fwd", mutates_args=())
def selective_scan_fwd(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass: y (T, d_inner), final_state (S, d_inner, N), states kept for the backward (rows, d_inner, N)."""
    check_cu_seqlens_values(cu_seqlens, u.shape[0])
    args = (u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)
    y, final = FORMS[backend](*args)
    return y, final, final.new_empty(0, *A.shape)


@selective_scan_fwd.register_fake
def _fwd_fake(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    save: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    documents, dtype = document_count(cu_seqlens), compute_dtype(u)
    rows = checkpoint_rows(u.shape[0], documents, backend, save)
    return (
        u.new_empty(u.shape),
        u.new_empty(documents, *A.shape, dtype=dtype),
        u.new_empty(rows, *A.shape, dtype=dtype),
    )


def _grad_like(value: Tensor | None, reference: Tensor) -> Tensor:
    """The place of a gradient in the backward op's outputs, which can't be None: empty for an absent input."""
    return reference.new_empty(0) if value is None else value.new_empty(value.shape)


@torch.library.custom_op("sambay_kernels::selective_scan_bwd", mutates_args=())
def selective_scan_bwd(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in its input's type; empty for None."""
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    grads = _differentiate(backend, grad_y, grad_final, inputs, delta_softplus, cu_seqlens)
    out = [u.new_empty(0) if v is None else g.to(v.dtype).contiguous() for v, g in zip(inputs, grads, strict=True)]
    return out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]


@selective_scan_bwd.register_fake
def _bwd_fake(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    checkpoints: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    out = [_grad_like(v, u) for v in (u, delta, A, B, C, D, z, delta_bias, initial_state)]
    return out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7], out[8]


# Which dimension of (u, delta, A, B, C, D, z, delta_bias, initial_state) holds the channels; B and C have none.
_CHANNEL_DIM = (1, 1, 0, None, None, 0, 1, 0, 1)


def _differentiate(
    backend: str,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    inputs: tuple[Tensor | None, ...],
    delta_softplus: bool,
    cu_seqlens: Tensor | None,
) -> list[Tensor]:
    """Backward of a differentiable form: run it again under autograd, a slice of channels at a time to bound memory."""
    u, A = inputs[0], inputs[2]
    assert u is not None and A is not None
    width = max(16, SCAN_BLOCK_ELEMENTS // max(1, u.shape[0] * A.shape[1]))
    work = compute_dtype(u)
    sums: list[Tensor] = [u.new_empty(0) if v is None else torch.zeros_like(v, dtype=work) for v in inputs]
    for first in range(0, u.shape[1], width):
        size = min(width, u.shape[1] - first)
        leaves = [
            None if v is None else (v if dim is None else v.narrow(dim, first, size)).detach().requires_grad_()
            for v, dim in zip(inputs, _CHANNEL_DIM, strict=True)
        ]
        with autograd_inside_op():
            y, final = FORMS[backend](*leaves[:8], delta_softplus, cu_seqlens, leaves[8])
        outputs, grads = [], []
        for value, grad in ((y, grad_y), (final, grad_final)):
            if grad is not None and value.requires_grad:
                outputs.append(value)
                grads.append(grad.narrow(1, first, size))
        used = [v for v in leaves if v is not None]
        found = iter(torch.autograd.grad(outputs, used, grads, allow_unused=True) if outputs else [None] * len(used))
        for total, leaf, dim in zip(sums, leaves, _CHANNEL_DIM, strict=True):
            part = None if leaf is None else next(found)
            if part is not None:
                (total if dim is None else total.narrow(dim, first, size)).add_(part)
    return sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state, _, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, cu_seqlens, initial_state, output[2])
    ctx.delta_softplus, ctx.backend = delta_softplus, backend


def _backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    u, delta, A, B, C, D, z, delta_bias, cu_seqlens, initial_state, checkpoints = ctx.saved_tensors
    grads = selective_scan_bwd(
        grad_y,
        grad_final,
        u,
        delta,
        A,
        B,
        C,
        D,
        z,
        delta_bias,
        ctx.delta_softplus,
        cu_seqlens,
        initial_state,
        checkpoints,
        ctx.backend,
    )
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    out = [None if v is None else g for v, g in zip(inputs, grads, strict=True)]
    return (*out[:8], None, None, out[8], None, None)


selective_scan_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.sambay_kernels.selective_scan_fwd)
def selective_scan_flops(u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any) -> int:
    """6 per token, channel and state: dt A; dt u B; a h + b (2); y += C h (2). The exponential isn't counted."""
    return 6 * u[0] * A[0] * A[1]


@register_flop_formula(torch.ops.sambay_kernels.selective_scan_bwd)
def selective_scan_bwd_flops(
    grad_y: Any, grad_final: Any, u: Any, delta: Any, A: Any, *args: Any, **kwargs: Any
) -> int:
    """15 per token, channel and state: dh 3, dC 2, dB 2, du 2, ddelta 4, dA 2. Recomputation isn't counted."""
    return 15 * u[0] * A[0] * A[1]
