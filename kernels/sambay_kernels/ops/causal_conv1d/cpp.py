"""Causal convolution by the C++ extension."""

from __future__ import annotations

from torch import Tensor

from ...native.cpp_call import ConvArgs, ConvBackward, ConvForward, borders_of, call, groups_of
from ...native.tensors import packed, pointer, rows, rows_of
from ...runtime.checks import compute_dtype, stored_dtype
from .inputs import ConvInputs


class _Call:
    """The inputs in the form C++ reads (taps and states outside channels), kept alive while it does."""

    def __init__(self, inputs: ConvInputs, grad_y: Tensor | None = None) -> None:
        x, weight, bias, activation, cu_seqlens, initial_state = inputs
        self.stored = stored_dtype(x, grad_y)
        self.dtype = dtype = compute_dtype(x)
        self.borders = borders_of(cu_seqlens, x.shape[0])
        self.documents = self.borders.numel() - 1
        state = None if initial_state is None else initial_state.transpose(1, 2)
        self.x = rows(x, self.stored)
        self.tensors = [packed(value, dtype) for value in (weight.t(), bias, state)]
        vectors = [pointer(value) for value in self.tensors]
        sizes = (*x.shape, weight.shape[1], self.documents)
        self.args = ConvArgs(*sizes, pointer(self.borders), rows_of(self.x), *vectors, int(activation == "silu"))


def causal_conv1d_cpp(inputs: ConvInputs) -> tuple[Tensor, Tensor]:
    """y (T, d) and final_state (S, d, K-1), both in x's type."""
    made, x = _Call(inputs), inputs.x
    y = x.new_empty(x.shape, dtype=made.stored)
    final = x.new_empty(made.documents, inputs.weight.shape[1] - 1, x.shape[1], dtype=made.stored)
    call("conv_forward", made.stored, ConvForward(made.args, pointer(y), pointer(final)))
    return y.to(x.dtype), final.to(x.dtype).transpose(1, 2).contiguous()


def causal_conv1d_cpp_backward(
    grad_y: Tensor | None, grad_final: Tensor | None, inputs: ConvInputs
) -> list[Tensor | None]:
    """Gradients of x, weight, bias, initial_state, summed in the compute type; None for None."""
    made, x = _Call(inputs, grad_y), inputs.x
    channels, width, groups = x.shape[1], inputs.weight.shape[1], groups_of(made.borders)
    grad_x = x.new_empty(x.shape, dtype=made.stored)
    grad_weight = x.new_empty(groups, width, channels, dtype=made.dtype)
    grad_bias = None if inputs.bias is None else x.new_empty(groups, channels, dtype=made.dtype)
    grad_state = None
    if inputs.initial_state is not None:
        grad_state = x.new_empty(made.documents, width - 1, channels, dtype=made.dtype)
    given = (
        rows(grad_y, made.stored),
        packed(None if grad_final is None else grad_final.transpose(1, 2), made.dtype),
    )
    outputs = [pointer(value) for value in (grad_x, grad_weight, grad_bias, grad_state)]
    args = ConvBackward(made.args, rows_of(given[0]), pointer(given[1]), *outputs)
    call("conv_backward", made.stored, args)
    return [
        grad_x,
        grad_weight.sum(0).t(),
        None if grad_bias is None else grad_bias.sum(0),
        None if grad_state is None else grad_state.transpose(1, 2),
    ]
