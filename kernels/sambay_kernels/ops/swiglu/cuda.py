"""SwiGLU by the CUDA C++ kernels: any shape as rows, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cuda_call import SwigluBackward, SwigluForward, call, common_type
from ...native.tensors import pointer, rows, rows_of


def _as_rows(values: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Each as (rows, width) with contiguous rows, all in one row if they are contiguous; copied only where needed."""
    shape = (1, -1) if all(value.is_contiguous() for value in values) else (-1, values[0].shape[-1])
    return [made for value in values if (made := rows(value.reshape(shape), dtype)) is not None]


def swiglu_cuda(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(gate, value)
    out = gate.new_empty(gate.shape, dtype=dtype)
    if out.numel():
        inputs = _as_rows((gate, value), dtype)
        call("swiglu_forward", SwigluForward(*inputs[0].shape, *map(rows_of, inputs), pointer(out)), dtype, gate.device)
    return out.to(gate.dtype)


def swiglu_cuda_backward(grad: Tensor, gate: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and value, in float32 if the inputs' types differ.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(grad, gate, value)
    grads = tuple(gate.new_empty(gate.shape, dtype=dtype) for _ in range(2))
    if gate.numel():
        inputs = _as_rows((grad, gate, value), dtype)
        args = SwigluBackward(*inputs[0].shape, *map(rows_of, inputs), *map(pointer, grads))
        call("swiglu_backward", args, dtype, gate.device)
    return grads[0], grads[1]
