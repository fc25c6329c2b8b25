"""The selective scan as two torch.library ops, forward and backward: fakes, autograd, FLOP formulas.

Nothing is mutated and no value is read from a device, so compilers and checkpointing may move the ops about. `backend`
is an argument: a backward pass runs on the backend that kept its states, whatever the environment says by then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...native.cpp_build import problem
from ...native.cuda_call import problem as cuda_problem
from ...runtime.checks import compute_dtype
from ...runtime.dispatch import register
from ...runtime.packing import check_cu_seqlens_values, document_count
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import SCAN_KEPT_EVERY, selective_scan_cpp, selective_scan_cpp_backward
from .cuda import CUDA_KEPT_EVERY, selective_scan_cuda, selective_scan_cuda_backward
from .inputs import ScanInputs
from .torch import selective_scan_torch
from .torch_backward import selective_scan_torch_backward
from .triton import TRITON_KEPT_EVERY, selective_scan_triton, selective_scan_triton_backward

OP = "selective_scan"
INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, Tensor? cu_seqlens, Tensor? initial_state"
)


def _forward_torch(inputs: ScanInputs, kept_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    y, final = selective_scan_torch(*inputs)
    return y, final, final.new_empty(kept_shape)


def _backward_torch(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ScanInputs, kept: Tensor
) -> list[Tensor | None]:
    return selective_scan_torch_backward(grad_y, grad_final, inputs)


FORWARD = {
    "cpp": selective_scan_cpp,
    "triton": selective_scan_triton,
    "cuda": selective_scan_cuda,
    "torch": _forward_torch,
}
BACKWARD = {
    "cpp": selective_scan_cpp_backward,
    "triton": selective_scan_triton_backward,
    "cuda": selective_scan_cuda_backward,
    "torch": _backward_torch,
}
KEPT_EVERY = {"cpp": SCAN_KEPT_EVERY, "triton": TRITON_KEPT_EVERY, "cuda": CUDA_KEPT_EVERY}

register(OP, "cpp", ("cpu",), problem)
# 1.4 times as fast as Triton forward, 1.7 times backward (H100), and it keeps half as many states.
register(OP, "cuda", ("cuda",), cuda_problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")
register(OP, "reference")


def _kept_shape(inputs: ScanInputs, save: bool, backend: str) -> tuple[int, int, int]:
    """Shape of the states kept for the backward: one before every chunk of a document; the torch form keeps none."""
    rows = 0
    if save and backend in KEPT_EVERY:
        rows = inputs.u.shape[0] // KEPT_EVERY[backend] + document_count(inputs.cu_seqlens)
    return rows, inputs.A.shape[1], inputs.A.shape[0]


@registered("selective_scan_fwd", f"({INPUTS}, bool save, str backend) -> (Tensor y, Tensor final_state, Tensor kept)")
def selective_scan_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """y (T, d_inner), final_state (S, d_inner, N), and states kept for the backward if `save`."""
    inputs, save, backend = ScanInputs(*args[:11]), args[11], args[12]
    check_cu_seqlens_values(inputs.cu_seqlens, inputs.u.shape[0])
    return FORWARD[backend](inputs, _kept_shape(inputs, save, backend))


@selective_scan_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = ScanInputs(*args[:11])
    u, dtype = inputs.u, compute_dtype(inputs.u)
    return (
        u.new_empty(u.shape),
        u.new_empty((document_count(inputs.cu_seqlens), *inputs.A.shape), dtype=dtype),
        u.new_empty(_kept_shape(inputs, *args[11:]), dtype=dtype),
    )


@registered(
    "selective_scan_bwd",
    f"(Tensor? grad_y, Tensor? grad_final, {INPUTS}, Tensor kept, str backend) -> ({', '.join(['Tensor'] * 9)})",
)
def selective_scan_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, z, delta_bias, initial_state, each in its input's type; empty for None."""
    (grad_y, grad_final), (kept, backend), inputs = args[:2], args[13:], ScanInputs(*args[2:13])
    grads = BACKWARD[backend](grad_y, grad_final, inputs, kept)
    return tuple(
        inputs.u.new_empty(0) if value is None or grad is None else grad.to(value.dtype).contiguous()
        for value, grad in zip(inputs.differentiable(), grads, strict=True)
    )


@selective_scan_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    values = ScanInputs(*args[2:13]).differentiable()
    return tuple(args[2].new_empty(0) if value is None else value.new_empty(value.shape) for value in values)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:8], inputs[9], inputs[10], output[2])
    ctx.delta_softplus, ctx.backend = inputs[8], inputs[12]


def _backward(ctx: Any, grad_y: Tensor | None, grad_final: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    *tensors, cu_seqlens, initial_state, kept = ctx.saved_tensors
    inputs = ScanInputs(*(*tensors, ctx.delta_softplus, cu_seqlens, initial_state))
    found = selective_scan_bwd(grad_y, grad_final, *inputs, kept, ctx.backend)
    grads = [None if v is None else grad for v, grad in zip(inputs.differentiable(), found, strict=True)]
    return (*grads[:8], None, None, grads[8], None, None)


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
