"""Residual addition and LayerNorm as torch.library ops, forward and backward: fakes, autograd."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...native.cpp_build import problem
from ...runtime.checks import compute_dtype
from ...runtime.dispatch import register
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import add_layer_norm_cpp, add_layer_norm_cpp_backward
from .torch_backward import add_layer_norm_torch_backward, add_layer_norm_torch_forward
from .triton import add_layer_norm_triton, add_layer_norm_triton_backward

OP = "add_layer_norm"

FORWARD = {"cpp": add_layer_norm_cpp, "triton": add_layer_norm_triton, "torch": add_layer_norm_torch_forward}
BACKWARD = {
    "cpp": add_layer_norm_cpp_backward,
    "triton": add_layer_norm_triton_backward,
    "torch": add_layer_norm_torch_backward,
}

register(OP, "cpp", ("cpu",), problem)
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")
register(OP, "reference")


@registered(
    "add_layer_norm_fwd",
    "(Tensor hidden, Tensor? delta, Tensor weight, Tensor bias, float eps, ScalarType out_dtype, str backend) "
    "-> (Tensor total, Tensor normed, Tensor stats)",
)
def add_layer_norm_fwd(hidden: Tensor, delta: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """hidden + delta (empty without delta), its LayerNorm, the mean and 1 / deviation of every row (..., 2)."""
    *rest, backend = args
    total, normed, stats = FORWARD[backend](hidden, delta, *rest)
    return hidden.new_empty(0) if total is None else total, normed, stats


@add_layer_norm_fwd.register_fake
def _fwd_fake(hidden: Tensor, delta: Tensor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stats = hidden.new_empty(*hidden.shape[:-1], 2, dtype=compute_dtype(hidden))
    total = hidden.new_empty(0 if delta is None else hidden.shape)
    return total, hidden.new_empty(hidden.shape, dtype=args[3]), stats


@registered(
    "add_layer_norm_bwd",
    "(Tensor grad, Tensor? grad_total, Tensor read, Tensor stats, Tensor weight, ScalarType hidden_dtype, "
    "ScalarType delta_dtype, bool want_weight, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
)
def add_layer_norm_bwd(*args: Any) -> tuple[Tensor, ...]:
    """Gradients of hidden; of delta, empty where hidden's is it; of weight and bias, empty where not wanted."""
    *rest, backend = args
    of_total, of_delta, of_weight, of_bias = BACKWARD[backend](*rest)
    weight = args[4]
    of_delta = of_total.new_empty(0, dtype=args[6]) if of_delta is None else of_delta
    return of_total, of_delta, *(weight.new_empty(0) if x is None else x.to(weight.dtype) for x in (of_weight, of_bias))


@add_layer_norm_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    read, _, weight, hidden_dtype, delta_dtype, want_weight = args[2:8]
    of_delta = read.new_empty(0 if delta_dtype == hidden_dtype else read.shape, dtype=delta_dtype)
    small = [weight.new_empty(weight.shape if want_weight else 0) for _ in range(2)]
    return read.new_empty(read.shape, dtype=hidden_dtype), of_delta, *small


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (hidden, delta, weight), (total, _, stats) = inputs[:3], output
    stream = hidden if delta is None else total
    # What is read, where that is narrower: nothing else would keep the stream itself.
    read = stream.to(weight.dtype) if weight.dtype.itemsize < stream.dtype.itemsize else stream
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(read, stats, weight)
    ctx.mark_non_differentiable(stats, *([total] if delta is None else []))
    ctx.dtypes, ctx.backend = (hidden.dtype, (hidden if delta is None else delta).dtype), inputs[-1]


def _backward(ctx: Any, grad_total: Tensor | None, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    needed, (hidden_dtype, delta_dtype) = ctx.needs_input_grad[:4], ctx.dtypes
    found: list[Tensor | None] = [grad_total, None, None, None]
    if grad is not None:
        plan = (hidden_dtype, delta_dtype, any(needed[2:]), ctx.backend)
        found = list(add_layer_norm_bwd(grad, grad_total, *ctx.saved_tensors, *plan))
    if grad is None or hidden_dtype == delta_dtype:
        found[1] = None if found[0] is None else found[0].to(delta_dtype)
    return *(x if want else None for x, want in zip(found, needed, strict=True)), None, None, None


add_layer_norm_fwd.register_autograd(_backward, setup_context=_setup_context)
