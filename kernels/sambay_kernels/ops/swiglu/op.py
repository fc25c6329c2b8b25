"""SwiGLU as torch.library ops, forward and backward: fakes, autograd, FLOP formulas.

Twice, for two tensors and for one that holds both: the second kind's gradient is one tensor, written in place.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...native.cpp_build import problem
from ...native.cuda_call import problem as cuda_problem
from ...runtime.dispatch import register
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import swiglu_cpp, swiglu_cpp_backward
from .cuda import swiglu_cuda, swiglu_cuda_backward
from .torch import swiglu_torch
from .torch_backward import swiglu_torch_backward
from .triton import swiglu_triton, swiglu_triton_backward

OP = "swiglu"

FORWARD = {"cpp": swiglu_cpp, "triton": swiglu_triton, "cuda": swiglu_cuda, "torch": swiglu_torch}
BACKWARD = {
    "cpp": swiglu_cpp_backward,
    "triton": swiglu_triton_backward,
    "cuda": swiglu_cuda_backward,
    "torch": swiglu_torch_backward,
}

register(OP, "cpp", ("cpu",), problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
# Both reach the bandwidth of the memory; Triton needs no compiler.
register(OP, "cuda", ("cuda",), cuda_problem)
register(OP, "torch")
register(OP, "reference")


@registered("swiglu_fwd", "(Tensor gate, Tensor value, str backend) -> Tensor")
def swiglu_fwd(gate: Tensor, value: Tensor, backend: str) -> Tensor:
    """silu(gate) * value, contiguous."""
    return FORWARD[backend](gate, value).contiguous()


@swiglu_fwd.register_fake
def _fwd_fake(gate: Tensor, value: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@registered("swiglu_bwd", "(Tensor grad, Tensor gate, Tensor value, str backend) -> (Tensor, Tensor)")
def swiglu_bwd(grad: Tensor, gate: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and value, each in its input's type."""
    found = gate.new_empty(gate.shape), value.new_empty(value.shape)
    BACKWARD[backend](grad, gate, value, *found)
    return found


@swiglu_bwd.register_fake
def _bwd_fake(grad: Tensor, gate: Tensor, value: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    gate, value = ctx.saved_tensors
    return (*swiglu_bwd(grad, gate, value, ctx.backend), None)


swiglu_fwd.register_autograd(_backward, setup_context=_setup_context)


@registered("swiglu_fused_fwd", "(Tensor fused, str backend) -> Tensor")
def swiglu_fused_fwd(fused: Tensor, backend: str) -> Tensor:
    """silu(first half) * second half of the last dimension, contiguous."""
    return FORWARD[backend](*fused.chunk(2, -1)).contiguous()


@swiglu_fused_fwd.register_fake
def _fused_fwd_fake(fused: Tensor, backend: str) -> Tensor:
    return fused.new_empty(*fused.shape[:-1], fused.shape[-1] // 2)


@registered("swiglu_fused_bwd", "(Tensor grad, Tensor fused, str backend) -> Tensor")
def swiglu_fused_bwd(grad: Tensor, fused: Tensor, backend: str) -> Tensor:
    """Gradient of both halves, in one tensor."""
    found = fused.new_empty(fused.shape)
    BACKWARD[backend](grad, *fused.chunk(2, -1), *found.chunk(2, -1))
    return found


@swiglu_fused_bwd.register_fake
def _fused_bwd_fake(grad: Tensor, fused: Tensor, backend: str) -> Tensor:
    return fused.new_empty(fused.shape)


def _fused_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return swiglu_fused_bwd(grad, *ctx.saved_tensors, ctx.backend), None


swiglu_fused_fwd.register_autograd(_fused_backward, setup_context=_setup_context)


@register_flop_formula([torch.ops.sambay_kernels.swiglu_fwd, torch.ops.sambay_kernels.swiglu_fused_fwd])
def swiglu_flops(*args: Any, out_shape: Any, **kwargs: Any) -> int:
    """2 an element: gate * sigmoid * value. The sigmoid isn't counted."""
    return 2 * math.prod(out_shape)


@register_flop_formula([torch.ops.sambay_kernels.swiglu_bwd, torch.ops.sambay_kernels.swiglu_fused_bwd])
def swiglu_bwd_flops(grad: Any, *args: Any, **kwargs: Any) -> int:
    """7 an element: silu, its derivative, two products. Recomputation of the sigmoid isn't counted."""
    return 7 * math.prod(grad)
