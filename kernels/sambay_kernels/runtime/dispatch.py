"""Which implementation of an op runs on which device, and why.

Every op registers its backends here, best first. `SAMBAY_KERNELS` chooses one for the whole process:

    auto       the best one that is available for the tensor's device (the default)
    triton     Triton kernels (CUDA)
    cuda       CUDA C++ (scan and SwiGLU), built by nvcc on first use
    cpp        C++ (CPU), built on first use
    torch      plain torch, any device
    reference  plain loops in time, for tests and benchmarks only

An op that has no implementation by the requested name uses its best one (`why` says so). A requested implementation
that exists and can't run here is an error, never a silent change of backend. A backend is for the types it is
registered with: tensors of another type take the best one that is for theirs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .compiling import constant_when_traced

ENVIRONMENT = "SAMBAY_KERNELS"
CHOICES = ("auto", "triton", "cuda", "cpp", "torch", "reference")
# Triton and CUDA kernels calculate in float32: float64, which is for checking, is not for them.
SINGLE_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
_DTYPES = {"triton": SINGLE_PRECISION, "cuda": SINGLE_PRECISION}


@dataclass(frozen=True)
class Backend:
    """One implementation of an op.

    Attributes:
        name: one of CHOICES except auto.
        devices: device types it can run on; empty = any.
        missing: returns None when it can run on this machine, else the reason why not, with the remedy.
        dtypes: types of tensors it is for; empty = any.
        where: whether this machine is one where it is the better choice; elsewhere it runs when asked for by name.
    """

    name: str
    devices: tuple[str, ...]
    missing: Callable[[], str | None]
    dtypes: tuple[torch.dtype, ...]
    where: Callable[[], bool]

    def is_for(self, dtype: torch.dtype) -> bool:
        """Whether it is registered for tensors of this type."""
        return not self.dtypes or dtype in self.dtypes


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


def everywhere() -> bool:
    """For a backend that is chosen by its place in the order alone."""
    return True


def register(
    op_name: str,
    backend: str,
    devices: tuple[str, ...] = (),
    missing: Callable[[], str | None] = never_missing,
    dtypes: tuple[torch.dtype, ...] | None = None,
    where: Callable[[], bool] = everywhere,
) -> None:
    """Register an implementation of `op_name`.

    Order counts: register the best first. One that is best for some types only is registered for those first and for
    the rest further down.

    Args:
        devices, missing, dtypes, where: as in `Backend`; `dtypes` None: all types that this kind of backend calculates
            in.
    """
    if backend not in CHOICES[1:]:
        raise BackendError(f"{op_name}: unknown backend {backend!r}, choose from {', '.join(CHOICES[1:])}")
    dtypes = _DTYPES.get(backend, ()) if dtypes is None else dtypes
    _registry.setdefault(op_name, []).append(Backend(backend, devices, missing, dtypes, where))


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


def _best(op_name: str, device: str, dtype: torch.dtype) -> tuple[Backend, list[str]]:
    """The first backend for tensors of this type on the device, and why the better ones can't run."""
    passed: list[str] = []
    for backend in _registry[op_name]:
        if backend.name == "reference" or (backend.devices and device not in backend.devices):
            continue
        if not backend.is_for(dtype) or not backend.where():
            continue
        problem = backend.missing()
        if problem is None:
            return backend, passed
        passed.append(f"{backend.name}: {problem}")
    raise BackendError(
        f"{op_name}: no backend can run on {device} in {_name(dtype)} ({'; '.join(passed) or 'none is registered'})"
    )


def choose(op_name: str, device: str, dtype: torch.dtype) -> Choice:
    """Choose the backend of an op for a device type ("cpu", "cuda") and a type of tensors.

    Raises:
        BackendError: the op or the request is unknown, or the requested backend can't run here.
    """
    if not isinstance(op_name, str) or op_name not in _registry:
        raise BackendError(f"unknown op {op_name!r}, choose from {', '.join(ops())}")
    wish = requested()
    wished = [backend for backend in _registry[op_name] if backend.name == wish]
    for backend in wished:
        _check_can_run(op_name, device, backend)
        if backend.is_for(dtype):
            return Choice(op_name, device, wish, f"{ENVIRONMENT}={wish}")
    if wish != "auto" and not any(backend.name == wish for backends in _registry.values() for backend in backends):
        raise BackendError(f"{ENVIRONMENT}={wish}: no op has a {wish} backend yet, use {ENVIRONMENT}=auto")
    best, passed = _best(op_name, device, dtype)
    reason = "the best that can run here" if passed else f"the best for {device}"
    if wish != "auto":
        lack = f"which {op_name} doesn't have" + (f" for {_name(dtype)}" if wished else "")
        reason = f"{ENVIRONMENT}={wish}, {lack}: {reason}"
    return Choice(op_name, device, best.name, reason, "; ".join(passed))


def _check_can_run(op_name: str, device: str, backend: Backend) -> None:
    """Refuse a backend that SAMBAY_KERNELS names, that the op has, and that can't run here."""
    if backend.devices and device not in backend.devices:
        raise BackendError(
            f"{ENVIRONMENT}={backend.name}: {op_name}'s {backend.name} backend runs on {', '.join(backend.devices)}, "
            f"not on {device}: use {ENVIRONMENT}=auto"
        )
    problem = backend.missing()
    if problem is not None:
        raise BackendError(f"{ENVIRONMENT}={backend.name}: {op_name} can't use it: {problem}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A traced graph keeps the backend that was right when it was traced.
@constant_when_traced
def _backend_name(op_name: str, device: str, dtype: torch.dtype) -> str:
    return choose(op_name, device, dtype).backend


def backend_for(op_name: str, tensor: Tensor) -> str:
    """Name of the backend that runs `op_name` on this tensor.

    Raises:
        BackendError: SAMBAY_KERNELS is unknown or asks for a backend that can't run here.
    """
    return _backend_name(op_name, tensor.device.type, tensor.dtype)


def why(op_name: str, device: str | None = None, dtype: torch.dtype = torch.bfloat16) -> Choice:
    """What `sft doctor` prints of an op: backend, reason, remedy; by default for the type that models are trained in.

    Args:
        device: "cuda" or "cpu"; None: "cuda" if there is one.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return choose(op_name, device, dtype)
