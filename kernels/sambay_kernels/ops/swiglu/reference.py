"""SwiGLU as its definition. The oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor


def swiglu_reference(gate: Tensor, value: Tensor | None) -> Tensor:
    """silu(gate) * value = gate / (1 + exp(-gate)) * value, in float64 for float64 data, else in float32."""
    work = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, m = gate.to(work).chunk(2, -1) if value is None else (gate.to(work), value.to(work))
    return (g * torch.sigmoid(g) * m).to(gate.dtype)
