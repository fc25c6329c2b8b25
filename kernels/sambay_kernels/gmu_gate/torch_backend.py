"""The gate of a gated memory unit in plain torch.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def gmu_gate_torch(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory, as in `sambay_kernels.gmu_gate`."""
    work = torch.float64 if gate.dtype == torch.float64 else torch.float32
    return (F.silu(gate.to(work)) * memory.to(work)).to(gate.dtype)
