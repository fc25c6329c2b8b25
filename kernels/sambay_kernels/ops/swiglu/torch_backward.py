"""The backward pass of SwiGLU in plain torch; autograd doesn't record an op's inside."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import compute_dtype


def swiglu_torch_backward(grad: Tensor, gate: Tensor, value: Tensor, of_gate: Tensor, of_value: Tensor) -> None:
    """Write the gradients of gate and value."""
    work = compute_dtype(gate)
    d, g, m = grad.to(work), gate.to(work), value.to(work)
    s = torch.sigmoid(g)
    of_gate.copy_(d * m * (s * (1.0 + g * (1.0 - s))))
    of_value.copy_(d * g * s)
