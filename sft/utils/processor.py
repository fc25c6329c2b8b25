"""What this processor can multiply."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_UNITS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16"}
"""Flags of x86 processors that multiply bfloat16 several times as fast as float32, best first."""

_LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
"""Variables by which oneDNN, which multiplies torch's matrices, is kept from newer instructions."""


def bf16_unit() -> str | None:
    """The instructions that matrices in bfloat16 are multiplied with here, such as AMX; None: there are none."""
    allowed = next((os.environ[name] for name in _LIMITS if os.environ.get(name)), "DEFAULT").upper()
    found = [unit for flag, unit in _UNITS.items() if flag in _flags() and _allows(allowed, unit)]
    return found[0] if found else None


def _allows(limit: str, unit: str) -> bool:
    if limit in ("ALL", "DEFAULT") or "AMX" in limit:
        return True
    return unit != "AMX" and any(name in limit for name in ("BF16", "FP16", "AVX10"))


def processor_name() -> str:
    """What the first processor calls itself."""
    return _line("model name").partition(": ")[2] or platform.processor()


@functools.cache
def _flags() -> frozenset[str]:
    """What the first processor is said to have; nothing where the system doesn't say."""
    return frozenset(_line("flags").split())


def _line(start: str) -> str:
    try:
        lines = _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line for line in lines if line.startswith(start)), "")
