"""Causal convolution by the C++ extension."""

from __future__ import annotations

from torch import Tensor

from ..checks import compute_dtype
from ..cpp_call import ConvArgs, ConvBackward, ConvForward, borders_of, call, groups_of, packed, pointer, rows, rows_of


class _Inputs:
    """The inputs in the form C++ reads (taps and states outside channels), kept alive while it does."""

    def __init__(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        activation: str | None,
        cu_seqlens: Tensor | None,
        initial_state: Tensor | None,
    ) -> None:
        self.dtype = dtype = compute_dtype(x)
        self.borders = borders_of(cu_seqlens, x.shape[0])
        self.documents = self.borders.numel() - 1
        state = None if initial_state is None else initial_state.transpose(1, 2)
        self.x = rows(x, dtype)
        self.tensors = [packed(value, dtype) for value in (weight.t(), bias, state)]
        vectors = [pointer(value) for value in self.tensors]
        sizes = (*x.shape, weight.shape[1], self.documents)
        self.args = ConvArgs(*sizes, pointer(self.borders), rows_of(self.x), *vectors, int(activation == "silu"))


def causal_conv1d_cpp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y (T, d) and final_state (S, d, K-1), both in x's type."""
    inputs = _Inputs(x, weight, bias, activation, cu_seqlens, initial_state)
    y = x.new_empty(x.shape, dtype=inputs.dtype)
    final = x.new_empty(inputs.documents, weight.shape[1] - 1, x.shape[1], dtype=inputs.dtype)
    call("conv_forward", inputs.dtype, ConvForward(inputs.args, pointer(y), pointer(final)))
    return y.to(x.dtype), final.to(x.dtype).transpose(1, 2).contiguous()


def causal_conv1d_cpp_backward(
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    initial_state: Tensor | None,
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, initial_state in the compute type; None for None."""
    inputs = _Inputs(x, weight, bias, activation, cu_seqlens, initial_state)
    channels, width, groups = x.shape[1], weight.shape[1], groups_of(inputs.borders)
    grad_x = x.new_empty(x.shape, dtype=inputs.dtype)
    grad_weight = x.new_empty(groups, width, channels, dtype=inputs.dtype)
    grad_bias = None if bias is None else x.new_empty(groups, channels, dtype=inputs.dtype)
    grad_state = (
        None if initial_state is None else x.new_empty(inputs.documents, width - 1, channels, dtype=inputs.dtype)
    )
    given = (
        rows(grad_y, inputs.dtype),
        packed(None if grad_final is None else grad_final.transpose(1, 2), inputs.dtype),
    )
    outputs = [pointer(value) for value in (grad_x, grad_weight, grad_bias, grad_state)]
    args = ConvBackward(inputs.args, rows_of(given[0]), pointer(given[1]), *outputs)
    call("conv_backward", inputs.dtype, args)
    return [
        grad_x,
        grad_weight.sum(0).t(),
        None if grad_bias is None else grad_bias.sum(0),
        None if grad_state is None else grad_state.transpose(1, 2),
    ]
