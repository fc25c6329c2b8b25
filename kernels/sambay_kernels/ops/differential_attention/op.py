"""The two attention maps, and what follows them, as torch.library ops: fakes, autograd, FLOP formulas.

The first op ends before the maps are subtracted: the rest (`differential_combine`) follows FlashAttention's maps too.
In plain torch that rest is no op, for a compiler fuses it with its neighbours. In C++ all of it is one op.
"""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...native.cpp_build import problem as cpp_problem
from ...runtime.dispatch import register
from ...runtime.packing import check_cu_seqlens_values
from ...runtime.registered import registered
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import differential_attention_cpp, differential_attention_cpp_backward
from .inputs import DiffInputs
from .torch import diff_flash, diff_flash_backward, diff_maps, diff_maps_backward
from .triton import (
    diff_combine_triton,
    diff_combine_triton_backward,
    diff_maps_triton,
    diff_maps_triton_backward,
)

OP, COMBINE = "differential_attention", "differential_combine"
HALF_PRECISION = (torch.bfloat16, torch.float16)


@functools.cache
def _is_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)


# On CUDA `torch` is FlashAttention in half precision, which knows no float32. Triton's maps take half its time on an
# H100; on other GPUs FlashAttention stays the default until they have been measured.
register(OP, "triton", TRITON_DEVICES, triton_problem, HALF_PRECISION, where=_is_hopper)
register(OP, "cpp", ("cpu",), cpp_problem)
register(OP, "torch", dtypes=HALF_PRECISION)
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")
register(OP, "reference")
register(COMBINE, "triton", TRITON_DEVICES, triton_problem)
register(COMBINE, "torch")


COMBINE_INPUTS = "Tensor maps, Tensor lambda_full, Tensor subln_weight, float lambda_init, float eps"
TENSORS = "Tensor q, Tensor k, Tensor v"
PLAN = "Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt window, float scale, str backend"


def check_values(inputs: DiffInputs) -> None:
    """Check the documents' borders, whose values aren't known while a graph is traced."""
    check_cu_seqlens_values(inputs.cu_seqlens_q, inputs.q.shape[0], name="cu_seqlens_q")
    check_cu_seqlens_values(inputs.cu_seqlens_k, inputs.k.shape[0], name="cu_seqlens_k")
    borders = zip(pairwise(inputs.cu_seqlens_q.tolist()), pairwise(inputs.cu_seqlens_k.tolist()), strict=True)
    for s, ((first_q, last_q), (first_k, last_k)) in enumerate(borders):
        queries, keys = last_q - first_q, last_k - first_k
        if queries > keys:
            raise ValueError(
                f"{OP}: document {s} has {queries} queries but {keys} keys: its queries must be its last tokens"
            )


@registered("differential_maps_fwd", f"({TENSORS}, {PLAN}) -> (Tensor maps, Tensor lse)")
def differential_maps_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """Both softmax maps of every pair of heads: maps (Tq, Hq, 2d) and their log-sum-exp (Tq, Hq). window 0 = none."""
    inputs, backend = DiffInputs(*args[:7]), args[7]
    if backend == "triton":
        return diff_maps_triton(inputs)
    check_values(inputs)
    return diff_maps(inputs)


@differential_maps_fwd.register_fake
def _fwd_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q = args[0]
    tokens, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(tokens, heads, 2 * d), q.new_empty(tokens, heads, dtype=wide)


@registered(
    "differential_maps_bwd", f"(Tensor grad, {TENSORS}, Tensor maps, Tensor lse, {PLAN}) -> (Tensor, Tensor, Tensor)"
)
def differential_maps_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each in its input's type."""
    grad, q, k, v, maps, lse, *plan, backend = args
    form = diff_maps_triton_backward if backend == "triton" else diff_maps_backward
    return form(grad, DiffInputs(q, k, v, *plan), maps, lse)


@differential_maps_bwd.register_fake
def _bwd_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[1:4])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, window, scale, backend = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.plan = (window, scale, backend)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    q, k, v, cu_seqlens_q, cu_seqlens_k, maps, lse = ctx.saved_tensors
    found = differential_maps_bwd(grad, q, k, v, maps, lse, cu_seqlens_q, cu_seqlens_k, *ctx.plan)
    return (*found, *[None] * 5)


differential_maps_fwd.register_autograd(_backward, setup_context=_setup_context)


FLASH_INPUTS = f"{TENSORS}, {PLAN.removesuffix(', str backend')}, SymInt max_length_q, SymInt max_length_k"


@registered("flash_attention_fwd", f"({FLASH_INPUTS}) -> (Tensor out, Tensor lse)")
def flash_attention_fwd(*args: Any) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention for heads of one width, with a deterministic backward: (Tq, Hq, d), (Hq, Tq)."""
    return diff_flash(DiffInputs(*args[:7]), args[7:])


@flash_attention_fwd.register_fake
def _flash_fake(*args: Any) -> tuple[Tensor, Tensor]:
    q = args[0]
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@registered("flash_attention_bwd", f"(Tensor grad, Tensor out, Tensor lse, {FLASH_INPUTS}) -> (Tensor, Tensor, Tensor)")
def flash_attention_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v."""
    grad, out, lse, *inputs = args
    return diff_flash_backward(grad, DiffInputs(*inputs[:7]), tuple(inputs[7:]), out, lse)


@flash_attention_bwd.register_fake
def _flash_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x) for x in args[3:6])


def _flash_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:5])
    ctx.plan = inputs[5:]
    ctx.mark_non_differentiable(output[1])


def _flash_backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    return (*flash_attention_bwd(grad, *ctx.saved_tensors, *ctx.plan), *[None] * 6)


flash_attention_fwd.register_autograd(_flash_backward, setup_context=_flash_setup)


@registered("differential_combine_fwd", f"({COMBINE_INPUTS}) -> Tensor")
def differential_combine_fwd(*args: Any) -> Tensor:
    """The maps of every pair subtracted, normalised and scaled: (T, Hq, 2d) -> (T, Hq*d)."""
    return diff_combine_triton(*args)


@differential_combine_fwd.register_fake
def _combine_fake(maps: Tensor, *rest: Any) -> Tensor:
    return maps.new_empty(maps.shape[0], maps.shape[1] * maps.shape[2] // 2)


@registered("differential_combine_bwd", f"(Tensor grad, {COMBINE_INPUTS}) -> (Tensor, Tensor, Tensor)")
def differential_combine_bwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of maps, lambda_full, subln_weight, each in its input's type."""
    return diff_combine_triton_backward(*args)


@differential_combine_bwd.register_fake
def _combine_backward_fake(*args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in args[1:4])


def _combine_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.plan = inputs[3:]


def _combine_backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return (*differential_combine_bwd(grad, *ctx.saved_tensors, *ctx.plan), None, None)


differential_combine_fwd.register_autograd(_combine_backward, setup_context=_combine_setup)


WHOLE = (
    "Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt window, float scale, "
    "Tensor lambda_full, Tensor subln_weight, float lambda_init, float eps"
)


@registered("differential_attention_fwd", f"({WHOLE}) -> (Tensor out, Tensor mixed, Tensor softmax)")
def differential_attention_fwd(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The whole op, (Tq, Hq*d), with what its backward reads: as `differential_attention_cpp`."""
    inputs = DiffInputs(*args[:7])
    check_values(inputs)
    return differential_attention_cpp(inputs, *args[7:])


@differential_attention_fwd.register_fake
def _whole_fake(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, heads, d = q.shape
    wide = torch.promote_types(q.dtype, torch.float32)
    flat = (tokens, heads * d)
    return q.new_empty(flat), q.new_empty(flat), q.new_empty(tokens, heads, 2, dtype=wide)


@registered(
    "differential_attention_bwd",
    f"(Tensor grad, Tensor mixed, Tensor softmax, {WHOLE}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def differential_attention_bwd(grad: Tensor, mixed: Tensor, softmax: Tensor, *args: Any) -> tuple[Tensor, ...]:
    """Gradients of q, k, v, lambda_full and subln_weight, each in its input's type."""
    return tuple(differential_attention_cpp_backward(grad, mixed, softmax, DiffInputs(*args[:7]), *args[7:]))


@differential_attention_bwd.register_fake
def _whole_backward_fake(grad: Tensor, mixed: Tensor, softmax: Tensor, *args: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (*args[:3], *args[7:9]))


def _whole_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:], *inputs[:5], *inputs[7:9])
    ctx.plan = (inputs[5:7], inputs[9:])
    ctx.mark_non_differentiable(*output[1:])


def _whole_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    (*tensors, lambda_full, weight), (plan, rest) = ctx.saved_tensors, ctx.plan
    *found, of_lambda, of_weight = differential_attention_bwd(grad, *tensors, *plan, lambda_full, weight, *rest)
    return (*found, *[None] * 4, of_lambda, of_weight, None, None)


differential_attention_fwd.register_autograd(_whole_backward, setup_context=_whole_setup)


def visible_pairs(bounds_q: list[int], bounds_k: list[int], window: int) -> int:
    """How many (query, key) pairs are visible, one head counted."""
    total = 0
    for s in range(len(bounds_q) - 1):
        n, m = bounds_q[s + 1] - bounds_q[s], bounds_k[s + 1] - bounds_k[s]
        reach = min(window, m) if window else m
        growing = min(n, max(0, reach - (m - n)))
        total += growing * (m - n) + growing * (growing + 1) // 2 + (n - growing) * reach
    return total


def _multiply_adds(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, window: int) -> int:
    """Multiply-adds of one product of width d over all visible pairs of all heads."""
    return q.shape[1] * q.shape[2] * visible_pairs(cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), window)


# The whole op is counted by its definition, whatever it saves by subtracting the maps before they meet the values.
@register_flop_formula(
    [torch.ops.sambay_kernels.differential_maps_fwd, torch.ops.sambay_kernels.differential_attention_fwd], get_raw=True
)
def differential_maps_flops(q: Tensor, k: Tensor, v: Tensor, *plan: Any, **kwargs: Any) -> int:
    """Scores (width d) and values (width 2d), visible pairs only; padding and softmax aren't counted."""
    return 2 * 3 * _multiply_adds(q, *plan[:3])


@register_flop_formula(torch.ops.sambay_kernels.differential_maps_bwd, get_raw=True)
def differential_maps_bwd_flops(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, maps: Tensor, lse: Tensor, *plan: Any, **kwargs: Any
) -> int:
    """Scores again, dq and dk (width d), dv and the weights' gradient (width 2d)."""
    return 2 * 7 * _multiply_adds(q, *plan[:3])


@register_flop_formula(torch.ops.sambay_kernels.differential_attention_bwd, get_raw=True)
def differential_attention_bwd_flops(
    grad: Tensor, mixed: Tensor, softmax: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any, **kwargs: Any
) -> int:
    """As `differential_maps_bwd_flops`."""
    return 2 * 7 * _multiply_adds(q, *rest[:3])


# Of the two widths, queries' and values', the queries' half is padding.
@register_flop_formula(torch.ops.sambay_kernels.flash_attention_fwd, get_raw=True)
def flash_attention_flops(q: Tensor, k: Tensor, v: Tensor, *plan: Any, **kwargs: Any) -> int:
    """As `differential_maps_flops`."""
    return 3 * _multiply_adds(q, *plan[:3])


@register_flop_formula(torch.ops.sambay_kernels.flash_attention_bwd, get_raw=True)
def flash_attention_bwd_flops(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, *rest: Any, **kwargs: Any) -> int:
    """As `differential_maps_bwd_flops`."""
    return 7 * _multiply_adds(q, *rest[2:5])
