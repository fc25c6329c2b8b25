"""silu(gate) * value: the gate of a SwiGLU MLP, which is that of a gated memory unit too."""

from __future__ import annotations

from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_tensor
from ...runtime.dispatch import backend_for
from .op import OP, swiglu_fwd
from .reference import swiglu_reference


def swiglu(gate: Tensor, value: Tensor) -> Tensor:
    """silu(gate) * value (SwiGLU, Shazeer 2020, where value is the up projection; SambaY, Ren et al. 2025, eq. 2).

    Args:
        gate, value: tensors of the same shape, any number of dimensions.

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
    check_tensor(OP, "value", value, tuple(gate.shape), gate.device)
    backend = backend_for(OP, gate)
    if backend == "reference":
        return recorded_in_own_types(swiglu_reference, gate, value)
    return swiglu_fwd(gate, value, backend)
