"""The gate as a pair of torch.library ops: forward and backward, with fakes, autograd and FLOP formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..dispatch import register
from ..recompute import autograd_inside_op
from .reference import gmu_gate_reference
from .torch_backend import gmu_gate_torch

OP = "gmu_gate"
FORMS: dict[str, Callable[..., Any]] = {"torch": gmu_gate_torch, "reference": gmu_gate_reference}

register(OP, "torch")
register(OP, "reference")


@torch.library.custom_op("sambay_kernels::gmu_gate_fwd", mutates_args=())
def gmu_gate_fwd(gate: Tensor, memory: Tensor, backend: str) -> Tensor:
    """Forward pass: silu(gate) * memory, contiguous."""
    return FORMS[backend](gate, memory).contiguous()


@gmu_gate_fwd.register_fake
def _fwd_fake(gate: Tensor, memory: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("sambay_kernels::gmu_gate_bwd", mutates_args=())
def gmu_gate_bwd(grad: Tensor, gate: Tensor, memory: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and memory, each in its input's type."""
    leaves = (gate.detach().requires_grad_(), memory.detach().requires_grad_())
    with autograd_inside_op():
        y = FORMS[backend](*leaves)
    found = torch.autograd.grad(y, leaves, grad)
    return found[0].contiguous(), found[1].contiguous()


@gmu_gate_bwd.register_fake
def _bwd_fake(grad: Tensor, gate: Tensor, memory: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), memory.new_empty(memory.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, memory, backend = inputs
    ctx.save_for_backward(gate, memory)
    ctx.backend = backend


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, memory = ctx.saved_tensors
    return (*gmu_gate_bwd(grad, gate, memory, ctx.backend), None)


gmu_gate_fwd.register_autograd(_backward, setup_context=_setup_context)


def _elements(shape: Any) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


@register_flop_formula(torch.ops.sambay_kernels.gmu_gate_fwd)
def gmu_gate_flops(gate: Any, *args: Any, **kwargs: Any) -> int:
    """2 an element: gate * sigmoid * memory. The sigmoid isn't counted."""
    return 2 * _elements(gate)


@register_flop_formula(torch.ops.sambay_kernels.gmu_gate_bwd)
def gmu_gate_bwd_flops(grad: Any, gate: Any, *args: Any, **kwargs: Any) -> int:
    """7 an element: silu, its derivative, two products. Recomputation of the sigmoid isn't counted."""
    return 7 * _elements(gate)
