"""Causal depthwise convolution over packed documents."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_leading, check_optional, check_tensor
from ...runtime.dispatch import backend_for
from ...runtime.packing import check_cu_seqlens_form, check_cu_seqlens_values, document_count
from .inputs import ConvInputs
from .op import OP, causal_conv1d_fwd
from .reference import causal_conv1d_reference


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Literal["silu"] | None = "silu",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = act(bias + sum_k weight[:, k] x_{t-K+1+k}) inside each document (Mamba's short convolution).

    Args:
        x: (T, d) tokens of all documents.
        weight: (d, K) one filter a channel; the last column meets the current token.
        bias: (d,) or None.
        activation: "silu" or None.
        cu_seqlens: int32 (S+1,) document borders, from 0 to T; None = one document. Documents may be empty.
        initial_state: (S, d, K-1) the inputs before each document, oldest first; None = zeros.

    Floating-point types may be mixed; arithmetic is float32, or float64 when x is float64. A gradient has the type of
    its input. Same input, same bits. One document's outputs and token gradients don't depend on the others.

    Returns:
        y (T, d) in x's type, and final_state (S, d, K-1) in x's type: the last K-1 inputs of each document, those of
        the initial state included when it is short. Both are differentiable, once.

    Raises:
        ValueError: a wrong shape, type, device, activation or cu_seqlens, T * d above 2**31 - 1, or a SAMBAY_KERNELS
            that can't be met.
        TypeError: an argument is not a tensor.
    """
    check_leading(OP, "x", x, 2)
    check_leading(OP, "weight", weight, 2)
    (_, channels), width, device = x.shape, weight.shape[1], x.device
    if width < 1:
        raise ValueError(f"{OP}: weight must have at least one column, got shape {tuple(weight.shape)}")
    if activation not in ("silu", None):
        raise ValueError(f"{OP}: activation must be 'silu' or None, got {activation!r}")
    check_cu_seqlens_form(cu_seqlens, device)
    check_tensor(OP, "weight", weight, (channels, width), device)
    check_optional(OP, "bias", bias, (channels,), device)
    check_optional(OP, "initial_state", initial_state, (document_count(cu_seqlens), channels, width - 1), device)
    inputs = ConvInputs(x, weight, bias, activation, cu_seqlens, initial_state)
    backend = backend_for(OP, x)
    if backend == "reference":
        check_cu_seqlens_values(cu_seqlens, x.shape[0])
        return recorded_in_own_types(lambda *args: causal_conv1d_reference(ConvInputs(*args)), *inputs)
    return causal_conv1d_fwd(*inputs, backend)
