"""Ops of SambaY models: token-major, packed by `cu_seqlens`, differentiable, safe under torch.compile.

Each op is a folder with its public function, a float64-capable reference and its backends; `dispatch` chooses one.
The package depends on torch alone (and on Triton or a compiler where it finds them).
"""

from __future__ import annotations

from .causal_conv1d import causal_conv1d, causal_conv1d_step
from .differential_attention import differential_attention, differential_attention_step
from .dispatch import BackendError, backend_for, why
from .gmu_gate import gmu_gate
from .linear_cross_entropy import linear_cross_entropy
from .selective_scan import selective_scan, selective_scan_step

__all__ = [
    "BackendError",
    "backend_for",
    "causal_conv1d",
    "causal_conv1d_step",
    "differential_attention",
    "differential_attention_step",
    "gmu_gate",
    "linear_cross_entropy",
    "selective_scan",
    "selective_scan_step",
    "why",
]
