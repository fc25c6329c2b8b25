"""Which implementation of an op runs on which device, and why.

Every op registers its backends here, best first. `SAMBAY_KERNELS` chooses one for the whole process:

    auto       the best one that is available for the tensor's device (the default)
    triton     Triton kernels (CUDA)
    cuda       CUDA C++ extension
    cpp        C++ extension (CPU)
    torch      plain torch, any device
    reference  plain loops in time, for tests and benchmarks only

An op that has no implementation by the requested name uses its best one (`why` says so). A requested implementation
that exists and can't run here is an error, never a silent change of backend. Triton and CUDA kernels calculate in
float32; float64 tensors, which are for checking, take the torch form on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ENVIRONMENT = "SAMBAY_KERNELS"
SINGLE_PRECISION = ("triton", "cuda")
CHOICES = ("auto", "triton", "cuda", "cpp", "torch", "reference")


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of CHOICES except auto.
        devices: device types it can run on; empty = any.
        missing: returns None when it can run on this machine, else the reason why not, with the remedy.
    """

    name: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None]


@dataclass(frozen=True)
class Choice:
    """What `why` answers: the backend an op uses, the reason for it, and what would make a better one available."""

    op: str
    device: str
    backend: str
    reason: str
    remedy: str = ""


class BackendError(ValueError):
    """SAMBAY_KERNELS asks for something unknown, or for a backend that can't run here."""


_registry: dict[str, list[Backend]] = {}


def never_missing() -> str | None:
    """For a backend that needs nothing but torch."""
    return None


def register(
    op_name: str, backend: str, devices: tuple[str, ...] = (), missing: Callable[[], str | None] = never_missing
) -> None:
    """Register an implementation of `op_name`. Order counts: register the best first."""
    if backend not in CHOICES[1:]:
        raise BackendError(f"{op_name}: unknown backend {backend!r}, choose from {', '.join(CHOICES[1:])}")
    _registry.setdefault(op_name, []).append(Backend(backend, devices, missing))


def ops() -> list[str]:
    """Names of all registered ops, sorted."""
    return sorted(_registry)


def requested() -> str:
    """The value of SAMBAY_KERNELS, checked.

    Raises:
        BackendError: the value is unknown.
    """
    value = os.environ.get(ENVIRONMENT, "").strip().lower() or "auto"
    if value not in CHOICES:
        raise BackendError(f"{ENVIRONMENT}={value!r} is unknown, choose from {', '.join(CHOICES)}")
    return value


def _best(op_name: str, device: str) -> tuple[Backend, list[str]]:
    """The first backend that can run on the device, and why the better ones can't."""
    passed: list[str] = []
    for backend in _registry[op_name]:
        if backend.name == "reference" or (backend.devices and device not in backend.devices):
            continue
        problem = backend.missing()
        if problem is None:
            return backend, passed
        passed.append(f"{backend.name}: {problem}")
    raise BackendError(f"{op_name}: no backend can run on {device} ({'; '.join(passed) or 'none is registered'})")


def choose(op_name: str, device: str) -> Choice:
    """Choose the backend of an op for a device type ("cpu", "cuda").

    Raises:
        BackendError: the op or the request is unknown, or the requested backend can't run here.
    """
    if op_name not in _registry:
        raise BackendError(f"unknown op {op_name!r}, choose from {', '.join(ops())}")
    wish = requested()
    if wish != "auto":
        for backend in _registry[op_name]:
            if backend.name == wish:
                return _forced(op_name, device, backend)
        if not any(backend.name == wish for backends in _registry.values() for backend in backends):
            raise BackendError(f"{ENVIRONMENT}={wish}: no op has a {wish} backend yet, use {ENVIRONMENT}=auto")
    best, passed = _best(op_name, device)
    reason = "the best that can run here" if passed else f"the best for {device}"
    if wish != "auto":
        reason = f"{ENVIRONMENT}={wish}, which {op_name} doesn't have: {reason}"
    return Choice(op_name, device, best.name, reason, "; ".join(passed))


def _forced(op_name: str, device: str, backend: Backend) -> Choice:
    """The choice when SAMBAY_KERNELS names a backend that the op has."""
    if backend.devices and device not in backend.devices:
        raise BackendError(
            f"{ENVIRONMENT}={backend.name}: {op_name}'s {backend.name} backend runs on {', '.join(backend.devices)}, "
            f"not on {device}: use {ENVIRONMENT}=auto"
        )
    problem = backend.missing()
    if problem is not None:
        raise BackendError(f"{ENVIRONMENT}={backend.name}: {op_name} can't use it: {problem}")
    return Choice(op_name, device, backend.name, f"{ENVIRONMENT}={backend.name}")


# A traced graph keeps the backend that was right when it was traced.
@torch.compiler.assume_constant_result
def _backend_name(op_name: str, device: str) -> str:
    return choose(op_name, device).backend


def backend_for(op_name: str, tensor: Tensor) -> str:
    """Name of the backend that runs `op_name` on this tensor.

    Raises:
        BackendError: SAMBAY_KERNELS is unknown or asks for a backend that can't run here.
    """
    name = _backend_name(op_name, tensor.device.type)
    return "torch" if tensor.dtype == torch.float64 and name in SINGLE_PRECISION else name


def why(op_name: str, device: str | None = None) -> Choice:
    """What `sft doctor` prints of an op: backend, reason, remedy. `device`: "cuda" if there is one, else "cpu"."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose(op_name, device)
