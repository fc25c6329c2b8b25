"""One token of each sequence (decoding): the last inputs live in slots and are updated in place."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ...runtime.checks import check_leading, check_optional, check_slots, check_tensor
from ...runtime.dispatch import backend_for, register
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import channel_block, launch, rows
from ...triton.launch import problem as triton_problem
from .torch import causal_conv1d_step_torch

OP = "causal_conv1d_step"
BLOCK = 256  # channels of a program

# No C++: for one token it has nothing to fuse that would pay for the call, and the torch form takes less time.
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")


@torch.no_grad()
def causal_conv1d_step(
    state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    slots: Tensor | None = None,
) -> Tensor:
    """One step of `causal_conv1d` for one token of each of R sequences; no gradient.

    Args:
        state: (slots, d, K-1), the last inputs, oldest first, contiguous; CHANGED to those after the step.
        x: (R, d); weight: (d, K); bias: (d,) or None; activation: as in `causal_conv1d`.
        slots: (R,) int64, the slot of each sequence, no slot twice; None: sequence r has slot r.

    Returns:
        y (R, d) in x's type.

    Raises:
        ValueError: a wrong shape, type, device or activation, or a state that isn't contiguous.
        TypeError: an argument is not a tensor.
    """
    check_leading(OP, "x", x, 2)
    check_leading(OP, "weight", weight, 2)
    (count, channels), width, device = x.shape, weight.shape[1], x.device
    if activation not in ("silu", None):
        raise ValueError(f"{OP}: activation must be 'silu' or None, got {activation!r}")
    check_tensor(OP, "weight", weight, (channels, width), device)
    check_optional(OP, "bias", bias, (channels,), device)
    check_slots(OP, state, slots, count, (channels, width - 1), device)
    if backend_for(OP, x) == "triton":
        return causal_conv1d_step_triton(state, x, weight, bias, activation, slots)
    return causal_conv1d_step_torch(state, x, weight, bias, activation, slots)


def causal_conv1d_step_triton(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, slots: Tensor | None
) -> Tensor:
    """The step by one Triton kernel; arguments checked already."""
    from .triton_kernels import conv_step_kernel

    (count, channels), width = x.shape, weight.shape[1]
    x, bias = rows(x), None if bias is None else bias.contiguous()
    y, block = x.new_empty(x.shape), channel_block(channels, BLOCK)
    launch(
        conv_step_kernel, (-(-channels // block), count), state, x, weight.contiguous(), bias, slots, y, channels,
        x.stride(0), WIDTH=width, BLOCK=block, SILU=activation == "silu", warps=1,
    )  # fmt: skip
    return y
