"""SwiGLU in plain torch.

The file imports nothing but torch and keeps its names to itself, so that it can travel inside an exported model.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_torch(gate: Tensor, value: Tensor | None = None) -> Tensor:
    """silu(gate) * value, as in `sambay_kernels.swiglu`."""
    work = torch.float64 if gate.dtype == torch.float64 else torch.float32
    g, m = gate.to(work).chunk(2, -1) if value is None else (gate.to(work), value.to(work))
    return (F.silu(g) * m).to(gate.dtype)
