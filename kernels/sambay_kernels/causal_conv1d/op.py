"""The causal convolution as two torch.library ops, forward and backward: fakes, autograd, FLOP formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import register
from ..packing import check_cu_seqlens_values, document_count
from ..recompute import autograd_inside_op
from .reference import causal_conv1d_reference
from .torch_backend import causal_conv1d_torch

OP = "causal_conv1d"
FORMS: dict[str, Callable[..., Any]] = {"torch": causal_conv1d_torch, "reference": causal_conv1d_reference}

register(OP, "torch")
register(OP, "reference")


@torch.library.custom_op("sambay_kernels::causal_conv1d_fwd", mutates_args=())
def causal_conv1d_fwd(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Forward pass: y (T, d), final_state (S, d, K-1)."""
    check_cu_seqlens_values(cu_seqlens, x.shape[0])
    return FORMS[backend](x, weight, bias, activation, cu_seqlens, initial_state)


@causal_conv1d_fwd.register_fake
def _fwd_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(document_count(cu_seqlens), x.shape[1], weight.shape[1] - 1)


@torch.library.custom_op("sambay_kernels::causal_conv1d_bwd", mutates_args=())
def causal_conv1d_bwd(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias, initial_state, each in its input's type; empty for None."""
    inputs = (x, weight, bias, initial_state)
    leaves = [None if v is None else v.detach().requires_grad_() for v in inputs]
    with autograd_inside_op():
        y, final = FORMS[backend](*leaves[:3], activation, cu_seqlens, leaves[3])
    pairs = [(v, g) for v, g in ((y, grad_y), (final, grad_final)) if g is not None and v.requires_grad]
    used = [v for v in leaves if v is not None]
    found = iter(
        torch.autograd.grad([v for v, _ in pairs], used, [g for _, g in pairs], allow_unused=True)
        if pairs
        else [None] * len(used)
    )
    grads = [x.new_empty(0) if v is None else _or_zeros(next(found), v) for v in inputs]
    return grads[0], grads[1], grads[2], grads[3]


def _or_zeros(grad: Tensor | None, value: Tensor) -> Tensor:
    return value.new_zeros(value.shape) if grad is None else grad.contiguous()


@causal_conv1d_bwd.register_fake
def _bwd_fake(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = [x.new_empty(0) if v is None else v.new_empty(v.shape) for v in (x, weight, bias, initial_state)]
    return out[0], out[1], out[2], out[3]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, activation, cu_seqlens, initial_state, backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, cu_seqlens, initial_state)
    ctx.activation, ctx.backend = activation, backend


def _backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, cu_seqlens, initial_state = ctx.saved_tensors
    grads = causal_conv1d_bwd(
        grad_y, grad_final, x, weight, bias, ctx.activation, cu_seqlens, initial_state, ctx.backend
    )
    out = [None if v is None else g for v, g in zip((x, weight, bias, initial_state), grads, strict=True)]
    return (*out[:3], None, None, out[3], None)


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.sambay_kernels.causal_conv1d_fwd)
def causal_conv1d_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 K per token and channel."""
    return 2 * x[0] * x[1] * weight[1]


@register_flop_formula(torch.ops.sambay_kernels.causal_conv1d_bwd)
def causal_conv1d_bwd_flops(grad_y: Any, grad_final: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """4 K per token and channel: the gradients of input and weight. Recomputation isn't counted."""
    return 4 * x[0] * x[1] * weight[1]
