"""Calling the CUDA C++ backend: its structures, as in csrc/scan.cu and csrc/swiglu.cu, and whether it works here."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from ctypes import Structure, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p, sizeof

import torch
from torch import Tensor

from .cuda_build import REMEDY, architecture, compiler, library
from .tensors import Rows, pointer

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class KernelError(RuntimeError):
    """A CUDA kernel couldn't be launched; the message says which, and what the CUDA runtime says of it."""


class ScanArgs(Structure):
    """Inputs of the selective scan and its plan."""

    _fields_ = (
        *((name, c_int64) for name in ("tokens", "channels", "states", "documents", "segments", "slabs", "tiles")),
        *((name, c_void_p) for name in ("start", "end", "document", "first", "borders")),
        *((name, Rows) for name in ("u", "delta", "B", "C", "z")),
        *((name, c_void_p) for name in ("A", "D", "bias", "initial")),
        ("softplus", c_int64),
    )


class ScanForward(Structure):
    """Inputs, scratch and outputs of the scan's forward pass."""

    _fields_ = (
        ("inputs", ScanArgs),
        *((name, c_void_p) for name in ("local", "elapsed", "carried", "y", "final_state", "kept")),
    )


class ScanBackward(Structure):
    """Inputs, scratch and outputs of the scan's backward pass."""

    _fields_ = (
        ("inputs", ScanArgs),
        ("grad_y", Rows),
        *((name, c_void_p) for name in ("grad_final", "kept", "local", "elapsed", "carried")),
        *((name, c_void_p) for name in ("u", "delta", "z", "A", "D", "bias", "B", "C", "initial")),
    )


class SumParts(Structure):
    """Partial sums and where their sum goes."""

    _fields_ = (("count", c_int64), ("size", c_int64), ("parts", c_void_p), ("sum", c_void_p))


def common_type(*tensors: Tensor | None) -> torch.dtype:
    """The type in which kernels read and write: that of the tensors if it is one and the same, else float32."""
    found = {value.dtype for value in tensors if value is not None}
    return found.pop() if len(found) == 1 and found <= TYPES.keys() else torch.float32


def _library(device: torch.device):  # type: ignore[no-untyped-def]
    return library(architecture(device))


def _raise_if(error: int, name: str, device: torch.device) -> None:
    if error:
        text = _library(device).sambay_cuda_error
        text.restype, text.argtypes = c_char_p, (c_int,)
        said = text(error).decode()
        raise KernelError(
            f"the CUDA kernel {name} can't run on {device}: {said} (error {error}): SAMBAY_KERNELS=triton avoids it"
        )


def check_device(device: torch.device) -> None:
    """Build or load the backend and ask the runtime whether its kernels fit this device.

    Raises:
        BuildError: it can't be built or loaded.
        KernelError: it doesn't fit.
    """
    check = _library(device).sambay_cuda_check
    check.restype, check.argtypes = c_int, (c_int,)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _raise_if(check(device.index or 0), "library", device)


@functools.cache
def problem() -> str | None:
    """None if the CUDA backend works on the current device, else why not and what to do."""
    missing = [] if compiler() else [f"nvcc was not found: {REMEDY}"]
    if not torch.cuda.is_available():
        built = torch.version.cuda is not None
        why = "no driver or no device is visible" if built else "this torch is built without CUDA: install one with it"
        missing.append(f"torch sees no CUDA device ({why})")
    if missing:
        return "; ".join(missing)
    try:
        check_device(torch.device("cuda", torch.cuda.current_device()))
    except RuntimeError as error:
        return str(error)
    return None


def call(name: str, args: Structure, dtype: torch.dtype, device: torch.device) -> None:
    """Launch on the current stream of `device`; returns before the kernels have run.

    Raises:
        KernelError: the launch failed.
    """
    function = getattr(_library(device), f"sambay_cuda_{name}")
    function.restype, function.argtypes = c_int, (c_void_p, c_size_t, c_int, c_int, c_void_p)
    cuda = device.type == "cuda"  # otherwise the tests' emulator
    stream = torch.cuda.current_stream(device).cuda_stream if cuda else None
    with torch.cuda.device(device) if cuda else nullcontext():
        error = function(byref(args), sizeof(args), TYPES[dtype], device.index or 0, stream)
    _raise_if(error, name, device)


def sum_parts(parts: Tensor) -> Tensor:
    """Sum of float32 (count, ...) over its first dimension, one term after another."""
    out = parts.new_empty(parts.shape[1:])
    args = SumParts(parts.shape[0], out.numel(), pointer(parts), pointer(out))
    call("sum_parts", args, torch.float32, parts.device)
    return out
