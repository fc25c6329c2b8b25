"""The gate as two torch.library ops, forward and backward: fakes, autograd, FLOP formulas."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..cpp_build import problem
from ..cuda_build import problem as cuda_problem
from ..dispatch import register
from ..triton_call import DEVICES as TRITON_DEVICES
from ..triton_call import problem as triton_problem
from .cpp_backend import gmu_gate_cpp, gmu_gate_cpp_backward
from .cuda_backend import gmu_gate_cuda, gmu_gate_cuda_backward
from .torch_backend import gmu_gate_torch
from .torch_backward import gmu_gate_torch_backward
from .triton_backend import gmu_gate_triton, gmu_gate_triton_backward

OP = "gmu_gate"

FORWARD = {"cpp": gmu_gate_cpp, "triton": gmu_gate_triton, "cuda": gmu_gate_cuda, "torch": gmu_gate_torch}
BACKWARD = {
    "cpp": gmu_gate_cpp_backward,
    "triton": gmu_gate_triton_backward,
    "cuda": gmu_gate_cuda_backward,
    "torch": gmu_gate_torch_backward,
}

register(OP, "cpp", ("cpu",), problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
# After Triton until a measurement on a GPU says otherwise.
register(OP, "cuda", ("cuda",), cuda_problem)
register(OP, "torch")
register(OP, "reference")


@torch.library.custom_op("sambay_kernels::gmu_gate_fwd", mutates_args=())
def gmu_gate_fwd(gate: Tensor, memory: Tensor, backend: str) -> Tensor:
    """silu(gate) * memory, contiguous."""
    return FORWARD[backend](gate, memory).contiguous()


@gmu_gate_fwd.register_fake
def _fwd_fake(gate: Tensor, memory: Tensor, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("sambay_kernels::gmu_gate_bwd", mutates_args=())
def gmu_gate_bwd(grad: Tensor, gate: Tensor, memory: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Gradients of gate and memory, each in its input's type."""
    grad_gate, grad_memory = BACKWARD[backend](grad, gate, memory)
    return grad_gate.to(gate.dtype).contiguous(), grad_memory.to(memory.dtype).contiguous()


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


@register_flop_formula(torch.ops.sambay_kernels.gmu_gate_fwd)
def gmu_gate_flops(gate: Any, *args: Any, **kwargs: Any) -> int:
    """2 an element: gate * sigmoid * memory. The sigmoid isn't counted."""
    return 2 * math.prod(gate)


@register_flop_formula(torch.ops.sambay_kernels.gmu_gate_bwd)
def gmu_gate_bwd_flops(grad: Any, gate: Any, *args: Any, **kwargs: Any) -> int:
    """7 an element: silu, its derivative, two products. Recomputation of the sigmoid isn't counted."""
    return 7 * math.prod(gate)
