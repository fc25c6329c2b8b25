"""Residual addition and LayerNorm by Triton kernels: launches, sums over programs."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.segments import power_of_two
from ...triton.launch import launch

BLOCK = 2048  # elements that a program holds at once, of narrow rows
STEPS = 32  # such blocks, one after the other, whose gradients of weight and bias a program sums


def _shape(width: int) -> dict[str, int]:
    padded = power_of_two(width)
    rows = max(1, BLOCK // padded)
    return {"WIDTH": width, "PADDED": padded, "ROWS": rows, "warps": 8 if padded >= BLOCK else 4}


def add_layer_norm_triton(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor]:
    """hidden + delta (None without delta), its LayerNorm, and the mean and 1 / deviation of every row (..., 2)."""
    from .triton_kernels import add_layer_norm_forward_kernel

    total = None if delta is None else hidden.new_empty(hidden.shape)
    normed = hidden.new_empty(hidden.shape, dtype=out_dtype)
    stats = hidden.new_empty(*hidden.shape[:-1], 2, dtype=torch.float32)
    width = weight.shape[0]
    count, shape = hidden.numel() // width, _shape(width)
    launch(
        add_layer_norm_forward_kernel, (-(-count // shape["ROWS"]),), hidden.contiguous(),
        None if delta is None else delta.contiguous(), weight.contiguous(), bias.contiguous(), total, normed, stats,
        count, eps, **shape,
    )  # fmt: skip
    return total, normed, stats


def add_layer_norm_triton_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    read: Tensor,
    stats: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
    delta_dtype: torch.dtype,
    want_weight: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden; of delta, None where hidden's is it; of weight and bias, None where not wanted."""
    from .triton_kernels import add_layer_norm_backward_kernel

    width = weight.shape[0]
    count, shape = read.numel() // width, _shape(width)
    programs = -(-count // (shape["ROWS"] * STEPS))
    of_total = read.new_empty(read.shape, dtype=hidden_dtype)
    of_delta = None if delta_dtype == hidden_dtype else read.new_empty(read.shape, dtype=delta_dtype)
    sums = [read.new_empty(programs, width, dtype=torch.float32) if want_weight else None for _ in range(2)]
    launch(
        add_layer_norm_backward_kernel, (programs,), grad.contiguous(),
        None if grad_total is None else grad_total.contiguous(), read.contiguous(), stats, weight.contiguous(),
        of_total, of_delta, *sums, count, STEPS=STEPS, **shape,
    )  # fmt: skip
    of_weight, of_bias = (None if x is None else x.sum(0) for x in sums)
    return of_total, of_delta, of_weight, of_bias
