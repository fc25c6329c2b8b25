"""The gate by the CUDA C++ kernels: any shape as rows, launches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cpp_call import pointer, rows, rows_of
from ..cuda_call import GateBackward, GateForward, call, common_type


def _as_rows(values: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
    """Each as (rows, width) with contiguous rows, all in one row if they are contiguous; copied only where needed."""
    shape = (1, -1) if all(value.is_contiguous() for value in values) else (-1, values[0].shape[-1])
    return [made for value in values if (made := rows(value.reshape(shape), dtype)) is not None]


def gmu_gate_cuda(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory, contiguous.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(gate, memory)
    out = gate.new_empty(gate.shape, dtype=dtype)
    if out.numel():
        inputs = _as_rows((gate, memory), dtype)
        call("gate_forward", GateForward(*inputs[0].shape, *map(rows_of, inputs), pointer(out)), dtype, gate.device)
    return out.to(gate.dtype)


def gmu_gate_cuda_backward(grad: Tensor, gate: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and memory, in float32 if the inputs' types differ.

    Raises:
        KernelError: the launch failed.
    """
    dtype = common_type(grad, gate, memory)
    grads = tuple(gate.new_empty(gate.shape, dtype=dtype) for _ in range(2))
    if gate.numel():
        inputs = _as_rows((grad, gate, memory), dtype)
        args = GateBackward(*inputs[0].shape, *map(rows_of, inputs), *map(pointer, grads))
        call("gate_backward", args, dtype, gate.device)
    return grads[0], grads[1]
