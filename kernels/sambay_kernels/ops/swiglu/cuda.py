"""SwiGLU by the CUDA C++ kernels: any shape as rows, launches."""

from __future__ import annotations

from torch import Tensor

from ...native.cuda_call import call, common_type
from ...native.tensors import SwigluBackward, SwigluForward, pointer, rows_of
from .rows import as_rows, in_type


def swiglu_cuda(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value, contiguous.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(gate, value)
    out = gate.new_empty(gate.shape, dtype=dtype)
    if out.numel():
        inputs = as_rows(gate.to(dtype), value.to(dtype))
        call("swiglu_forward", SwigluForward(*inputs[0].shape, *map(rows_of, inputs), pointer(out)), dtype, gate.device)
    return out.to(gate.dtype)


def swiglu_cuda_backward(grad: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """Write the gradients of gate and value.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(grad, gate, value, of_gate, of_value)
    with in_type((of_gate, of_value), dtype) as outputs:
        if gate.numel():
            tensors = as_rows(*(x.to(dtype) for x in (grad, gate, value)), *outputs)
            call("swiglu_backward", SwigluBackward(*tensors[0].shape, *map(rows_of, tensors)), dtype, gate.device)
