"""The gate of a gated memory unit, as its definition. The oracle of every other backend."""

from __future__ import annotations

import torch
from torch import Tensor


def gmu_gate_reference(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory = gate / (1 + exp(-gate)) * memory, in float64 for float64 data, else in float32."""
    work = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g = gate.to(work)
    return (g * torch.sigmoid(g) * memory.to(work)).to(gate.dtype)
