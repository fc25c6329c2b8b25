"""Linear cross entropy as torch.library ops: the sum with its gradients, the losses by token, and their backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...runtime.dispatch import register
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .inputs import LceInputs
from .statistics import open_tally
from .torch import lce_kept_type, lce_losses, lce_losses_backward, lce_once, lce_scaled, lce_sum, lce_type
from .triton import lce_losses_triton, lce_losses_triton_backward, lce_sum_triton

OP = "linear_cross_entropy"
TENSORS = "Tensor hidden, Tensor weight, Tensor labels"
PLAN = (
    "SymInt ignore_index, float label_smoothing, float z_loss, SymInt chunk_size, Tensor? weights, str loss_type, "
    "float parameter, Tensor? teacher_ids, Tensor? teacher_logprobs, float distill_weight, str divergence, float skew, "
    "str tail, float temperature, bool rounded"
)
INPUTS = len(LceInputs._fields)

SUM = {"triton": lce_sum_triton, "torch": lce_sum}
FORWARD = {"triton": lce_losses_triton, "torch": lce_losses}
BACKWARD = {"triton": lce_losses_triton_backward, "torch": lce_losses_backward}

register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")
register(OP, "reference")


@registered(
    "linear_cross_entropy_sum",
    f"({TENSORS}, {PLAN}, str backend, bool want_hidden, bool want_weight) -> (Tensor, Tensor, Tensor)",
)
def linear_cross_entropy_sum(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the losses, and its gradients to hidden, in the wide type, and weight where wanted (else empty)."""
    backend, want_hidden, want_weight = args[INPUTS:]
    return SUM[backend](LceInputs(*args[:INPUTS]), want_hidden, want_weight, open_tally())


@linear_cross_entropy_sum.register_fake
def _sum_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, *_, want_hidden, want_weight = args
    wide = lce_type(hidden, weight)
    of_hidden = hidden.new_empty(hidden.shape if want_hidden else (0,), dtype=wide)
    of_weight = weight.new_empty(weight.shape if want_weight else (0,), dtype=lce_kept_type(weight.dtype))
    return hidden.new_empty((), dtype=wide), of_hidden, of_weight


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.wanted = inputs[-2:]
    ctx.types = tuple(x.dtype for x in inputs[:2])
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])
    # Else the gradients of the gradients arrive as zeros: of the weight alone 2 GB.
    ctx.set_materialize_grads(False)


def _sum_backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Any, ...]:
    lce_once()
    if grad is None:
        return (None,) * (INPUTS + 3)
    kept = zip(ctx.saved_tensors, ctx.types, ctx.wanted, strict=True)
    return (*[lce_scaled(x, grad, dtype) if want else None for x, dtype, want in kept], *[None] * (INPUTS + 1))


linear_cross_entropy_sum.register_autograd(_sum_backward, setup_context=_sum_setup)


@registered(
    "linear_cross_entropy_fwd", f"({TENSORS}, {PLAN}, str backend) -> (Tensor losses, Tensor saved, Tensor of_kept)"
)
def linear_cross_entropy_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of every token, (T,), zero where there is no label, and what its backward pass needs (`lce_saved`)."""
    return FORWARD[args[INPUTS]](LceInputs(*args[:INPUTS]), open_tally())


@linear_cross_entropy_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    inputs = LceInputs(*args[:INPUTS])
    wide, tokens = lce_type(inputs.hidden, inputs.weight), inputs.labels.shape[0]
    losses, saved = (inputs.hidden.new_empty(shape, dtype=wide) for shape in ((tokens,), (4, tokens)))
    return losses, saved, losses.new_empty((0,) if inputs.teacher_ids is None else inputs.teacher_ids.shape)


@registered(
    "linear_cross_entropy_bwd",
    f"(Tensor grad, Tensor saved, Tensor of_kept, {TENSORS}, {PLAN}, str backend, bool want_hidden, "
    "bool want_weight) -> (Tensor, Tensor)",
)
def linear_cross_entropy_bwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Gradients of sum(grad * losses) to hidden and weight where wanted (else empty)."""
    grad, saved, of_kept, *given = args
    *plan, backend, want_hidden, want_weight = given
    return BACKWARD[backend](grad, LceInputs(*plan), saved, of_kept, want_hidden, want_weight)


@linear_cross_entropy_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    hidden, weight, (want_hidden, want_weight) = args[3], args[4], args[-2:]
    grad_hidden = hidden.new_empty(hidden.shape if want_hidden else (0,))
    return grad_hidden, weight.new_empty(weight.shape if want_weight else (0,))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.plan = [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.places = [place for place, x in enumerate(inputs) if isinstance(x, Tensor)]
    ctx.save_for_backward(*output[1:], *(inputs[place] for place in ctx.places))
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:2]
    saved, of_kept, *tensors = ctx.saved_tensors
    plan = list(ctx.plan)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        plan[place] = tensor
    found = linear_cross_entropy_bwd(grad, saved, of_kept, *plan, *wanted)
    return (*[x if want else None for x, want in zip(found, wanted, strict=True)], *[None] * (len(plan) - 2))


linear_cross_entropy_fwd.register_autograd(_backward, setup_context=_setup)


def _product(hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int) -> int:
    """FLOPs of one product of the supervised tokens with the weight."""
    return 2 * int((labels != ignore_index).sum()) * weight.numel()


@register_flop_formula(torch.ops.sambay_kernels.linear_cross_entropy_sum, get_raw=True)
def linear_cross_entropy_sum_flops(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, *args: Any, **kwargs: Any
) -> int:
    """The logits and the gradients that are wanted; softmax isn't counted."""
    return _product(hidden, weight, labels, ignore_index) * (1 + sum(map(bool, args[-2:])))


@register_flop_formula(torch.ops.sambay_kernels.linear_cross_entropy_fwd, get_raw=True)
def linear_cross_entropy_flops(
    hidden: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, *args: Any, **kwargs: Any
) -> int:
    """The logits."""
    return _product(hidden, weight, labels, ignore_index)


@register_flop_formula(torch.ops.sambay_kernels.linear_cross_entropy_bwd, get_raw=True)
def linear_cross_entropy_bwd_flops(
    grad: Tensor,
    saved: Tensor,
    of_kept: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ignore_index: int,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The gradients that are wanted; the second computation of the logits isn't counted, as for checkpointing."""
    return _product(hidden, weight, labels, ignore_index) * sum(map(bool, args[-2:]))
