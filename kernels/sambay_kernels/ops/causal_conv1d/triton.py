"""Causal convolution by Triton kernels: plan, buffers, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.segments import segments
from ...triton.launch import channel_block, launch, rows
from .inputs import ConvInputs

TIME = 128  # tokens of a program: the WIDTH - 1 before them are read twice
BLOCK = 128  # channels of a program: 8 bytes of bfloat16 for each lane of a warp


def causal_conv1d_triton(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y and final_state."""
    from .triton_kernels import conv_forward_kernel

    x, weight, bias, activation, cu_seqlens, initial_state = inputs
    (total, channels), width = x.shape, weight.shape[1]
    x, weight = rows(x), weight.contiguous()
    bias, initial_state = (None if value is None else value.contiguous() for value in (bias, initial_state))
    cut, block = segments(cu_seqlens, total, TIME, x.device), channel_block(channels, BLOCK)
    y = x.new_empty(x.shape)
    final = x.new_empty((cut.borders.shape[0] - 1, channels, width - 1))
    launch(
        conv_forward_kernel, (-(-channels // block), cut.start.shape[0]), x, weight, bias, initial_state, cut.start,
        cut.end, cut.document, cut.borders, y, final, channels, x.stride(0),
        WIDTH=width, BLOCK=block, SILU=activation == "silu", warps=1,
    )  # fmt: skip
    return y, final


def causal_conv1d_triton_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ConvInputs
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, initial_state; None for None."""
    from .triton_kernels import conv_backward_kernel

    x, weight, bias, activation, cu_seqlens, initial_state = inputs
    (total, channels), width = x.shape, weight.shape[1]
    x, weight, grad_y = rows(x), weight.contiguous(), None if grad_y is None else rows(grad_y)
    bias, initial_state, grad_final = (None if v is None else v.contiguous() for v in (bias, initial_state, grad_final))
    cut, block = segments(cu_seqlens, total, TIME, x.device), channel_block(channels, BLOCK)
    count = cut.start.shape[0]
    grad_x = x.new_empty(x.shape)
    sums = x.new_empty((count, width, channels), dtype=torch.float32)
    sum_bias = None if bias is None else x.new_empty((count, channels), dtype=torch.float32)
    grad_initial = None if initial_state is None else x.new_empty(initial_state.shape, dtype=torch.float32)
    launch(
        conv_backward_kernel, (-(-channels // block), count), grad_y, grad_final, x, weight, bias, initial_state,
        cut.start, cut.end, cut.document, cut.borders, grad_x, sums, sum_bias, grad_initial, channels,
        0 if grad_y is None else grad_y.stride(0), x.stride(0),
        WIDTH=width, BLOCK=block, SILU=activation == "silu", warps=1,
    )  # fmt: skip
    return [grad_x, sums.sum(0).t(), None if sum_bias is None else sum_bias.sum(0), grad_initial]
