"""Ops of SambaY models: token-major, packed by `cu_seqlens`, differentiable, safe under torch.compile.

Each op is a folder with its public function, a float64-capable reference and its backends; `dispatch` chooses one.
The package depends on torch alone (and on Triton or a compiler where it finds them).
"""

from __future__ import annotations

import importlib
from typing import Any

from .causal_conv1d import causal_conv1d
from .dispatch import BackendError, backend_for, why
from .gmu_gate import gmu_gate
from .selective_scan import selective_scan


def __getattr__(name: str) -> Any:
    if name in ("differential_attention", "differential_attention_step"):
        return getattr(importlib.import_module(".differential_attention", __name__), name)
    if name == "linear_cross_entropy":
        return importlib.import_module(".linear_cross_entropy", __name__).linear_cross_entropy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "BackendError",
    "backend_for",
    "causal_conv1d",
    "differential_attention",
    "differential_attention_step",
    "gmu_gate",
    "linear_cross_entropy",
    "selective_scan",
    "why",
]
