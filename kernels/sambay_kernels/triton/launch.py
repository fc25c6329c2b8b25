"""Launching Triton kernels: where they can run, and a record of launches for compiling ahead of time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..runtime.segments import power_of_two

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)
"""Devices whose tensors the kernels take: the CPU only under Triton's interpreter, which is for tests."""

# Triton 3.10 stops contracting multiplications and additions unless asked to; the kernels are made of those.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


@cache
def problem() -> str | None:
    """Why the Triton kernels can't be used, with the remedy; None where they can."""
    try:
        import triton
    except ImportError:
        return "triton is not installed (torch for CUDA brings it on Linux: pip install triton)"
    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 6):
        return f"triton {triton.__version__} is too old: pip install -U 'triton>=3.6' (torch 2.11 and later bring it)"
    return None


@dataclass(frozen=True)
class Launch:
    """One launch as it was asked for: the kernel, its grid, its arguments by name, and its options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    options: dict[str, int]


_record: list[Launch] | None = None
_recorded_for = 0  # major compute capability


@contextmanager
def recording(major: int) -> Iterator[list[Launch]]:
    """Collect launches for GPUs of a major compute capability instead of making them; with tensors on `meta`."""
    global _record, _recorded_for
    before, _record, _recorded_for = (_record, _recorded_for), [], major
    try:
        yield _record
    finally:
        _record, _recorded_for = before


def compute_capability(device: torch.device) -> int:
    """Major compute capability of the GPU that kernels are launched on, 0 under the interpreter: 8 A100, 9 H100."""
    if _record is not None:
        return _recorded_for
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int = 4, stages: int = 3, **constants: Any) -> None:
    """Run a kernel on a grid of programs; a grid without programs is no launch.

    Args:
        args: the kernel's arguments in order; None for a tensor that isn't there.
        constants: its compile-time constants by name.
    """
    options = {"num_warps": warps, "num_stages": stages}
    if _record is not None:
        names = kernel.arg_names
        _record.append(Launch(kernel, grid, {**dict(zip(names, args, strict=False)), **constants}, options))
    elif all(grid):
        with _device_of(args):
            kernel[grid](*args, **constants, **options)


@contextmanager
def _device_of(args: tuple[Any, ...]) -> Iterator[None]:
    """Triton launches on the current device, whatever its arguments' device."""
    first = next((value for value in args if isinstance(value, Tensor) and value.is_cuda), None)
    if first is None:
        yield
    else:
        with torch.cuda.device(first.device):
            yield


def rows(value: Tensor) -> Tensor:
    """A (T, width) matrix whose rows are contiguous; rows may stand apart."""
    return value if value.stride(-1) == 1 or value.shape[-1] == 1 else value.contiguous()


def channel_block(channels: int, block: int) -> int:
    """Channels of a program. Under the interpreter, which takes as long for a wide program, up to 512."""
    return min(512 if INTERPRETED else block, power_of_two(channels))
