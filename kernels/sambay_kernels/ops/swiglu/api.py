"""silu(gate) * value: the gate of a SwiGLU MLP, which is that of a gated memory unit too."""

from __future__ import annotations

from torch import Tensor

from ...runtime.autocast import recorded_in_own_types
from ...runtime.checks import check_tensor
from ...runtime.dispatch import backend_for
from .op import OP, swiglu_fused_fwd, swiglu_fwd
from .reference import swiglu_reference


def swiglu(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate) * value (SwiGLU, Shazeer 2020, where value is the up projection; SambaY, Ren et al. 2025, eq. 2).

    Args:
        gate, value: tensors of the same shape, any number of dimensions. Without `value`, gate's last dimension holds
            both, the gate first, as one projection makes them; their gradients then stand in one tensor as well, which
            saves the copy that would join them.

    Arithmetic is float32, or float64 when gate is float64. A gradient has the type of its input.

    Returns:
        A contiguous tensor of value's shape in gate's type, differentiable once.

    Raises:
        ValueError: shapes or devices differ, a type is not floating point, the last dimension can't be halved, or a
            SAMBAY_KERNELS that can't be met.
        TypeError: an argument is not a tensor.
    """
    if not isinstance(gate, Tensor):
        raise TypeError(f"{OP}: gate must be a tensor, got {type(gate)}")
    check_tensor(OP, "gate", gate, tuple(gate.shape), gate.device)
    if value is not None:
        check_tensor(OP, "value", value, tuple(gate.shape), gate.device)
    elif gate.dim() == 0 or gate.shape[-1] % 2:
        raise ValueError(f"{OP}: without value, gate's last dimension must be even, got shape {tuple(gate.shape)}")
    backend = backend_for(OP, gate)
    if backend == "reference":
        return recorded_in_own_types(swiglu_reference, gate, value)
    return swiglu_fused_fwd(gate, backend) if value is None else swiglu_fwd(gate, value, backend)
