"""The gate of a gated memory unit, which is the gate of a SwiGLU MLP too."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_tensor
from ..dispatch import backend_for
from .op import OP, gmu_gate_fwd
from .reference import gmu_gate_reference


def gmu_gate(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory (SambaY, Ren et al. 2025, eq. 2; SwiGLU, Shazeer 2020, with memory = the up projection).

    Args:
        gate, memory: tensors of the same shape, any number of dimensions.

    Arithmetic is float32, or float64 when gate is float64. A gradient has the type of its input.

    Returns:
        A contiguous tensor of that shape in gate's type, differentiable once.

    Raises:
        ValueError: shapes or devices differ, a type is not floating point, or a SAMBAY_KERNELS that can't be met.
        TypeError: an argument is not a tensor.
    """
    if not isinstance(gate, Tensor):
        raise TypeError(f"{OP}: gate must be a tensor, got {type(gate)}")
    check_tensor(OP, "gate", gate, tuple(gate.shape), gate.device)
    check_tensor(OP, "memory", memory, tuple(gate.shape), gate.device)
    backend = backend_for(OP, gate)
    return gmu_gate_reference(gate, memory) if backend == "reference" else gmu_gate_fwd(gate, memory, backend)
