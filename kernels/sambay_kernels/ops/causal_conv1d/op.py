"""The causal convolution as two torch.library ops, forward and backward: fakes, autograd, FLOP formulas."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...native.cpp_build import problem
from ...runtime.dispatch import register
from ...runtime.packing import check_cu_seqlens_values, document_count
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import causal_conv1d_cpp, causal_conv1d_cpp_backward
from .inputs import ConvInputs
from .torch import causal_conv1d_torch
from .torch_backward import causal_conv1d_torch_backward
from .triton import causal_conv1d_triton, causal_conv1d_triton_backward

OP = "causal_conv1d"
INPUTS = "Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? cu_seqlens, Tensor? initial_state"


def _forward_torch(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    return causal_conv1d_torch(*inputs)


FORWARD = {"cpp": causal_conv1d_cpp, "triton": causal_conv1d_triton, "torch": _forward_torch}
BACKWARD = {
    "cpp": causal_conv1d_cpp_backward,
    "triton": causal_conv1d_triton_backward,
    "torch": causal_conv1d_torch_backward,
}

register(OP, "cpp", ("cpu",), problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")
register(OP, "reference")


@registered("causal_conv1d_fwd", f"({INPUTS}, str backend) -> (Tensor y, Tensor final_state)")
def causal_conv1d_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """y (T, d), final_state (S, d, K-1)."""
    inputs, backend = ConvInputs(*args[:6]), args[6]
    check_cu_seqlens_values(inputs.cu_seqlens, inputs.x.shape[0])
    return FORWARD[backend](inputs)


@causal_conv1d_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    x, weight, cu_seqlens = args[0], args[1], args[4]
    return x.new_empty(x.shape), x.new_empty(document_count(cu_seqlens), x.shape[1], weight.shape[1] - 1)


@registered(
    "causal_conv1d_bwd",
    f"(Tensor? grad_y, Tensor? grad_final, {INPUTS}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def causal_conv1d_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of x, weight, bias, initial_state, each in its input's type; empty for None."""
    inputs = ConvInputs(*args[2:8])
    grads = BACKWARD[args[8]](args[0], args[1], inputs)
    return tuple(
        inputs.x.new_empty(0) if value is None or grad is None else grad.to(value.dtype).contiguous()
        for value, grad in zip(inputs.differentiable(), grads, strict=True)
    )


@causal_conv1d_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    values = ConvInputs(*args[2:8]).differentiable()
    return tuple(args[2].new_empty(0) if value is None else value.new_empty(value.shape) for value in values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:3], *inputs[4:6])
    ctx.activation, ctx.backend = inputs[3], inputs[6]


def _backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None) -> tuple[Any, ...]:
    x, weight, bias, cu_seqlens, initial_state = ctx.saved_tensors
    inputs = ConvInputs(x, weight, bias, ctx.activation, cu_seqlens, initial_state)
    found = causal_conv1d_bwd(grad_y, grad_final, *inputs, ctx.backend)
    grads = [None if v is None else grad for v, grad in zip(inputs.differentiable(), found, strict=True)]
    return (*grads[:3], None, None, grads[3], None)


causal_conv1d_fwd.register_autograd(_backward, setup_context=_setup_context)


@register_flop_formula(torch.ops.sambay_kernels.causal_conv1d_fwd)
def causal_conv1d_flops(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """2 K per token and channel."""
    return 2 * x[0] * x[1] * weight[1]


@register_flop_formula(torch.ops.sambay_kernels.causal_conv1d_bwd)
def causal_conv1d_bwd_flops(grad_y: Any, grad_final: Any, x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
    """4 K per token and channel: the gradients of input and weight. Recomputation isn't counted."""
    return 4 * x[0] * x[1] * weight[1]
