"""Input checks that the ops share: each raises a ValueError that names the argument and says what it should be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .packing import MAX_ELEMENTS

MOST = 3.4e38  # of a number that enters arithmetic in float32

FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    op: str, name: str, value: Tensor, shape: tuple[int, ...], device: torch.device, also: tuple[torch.dtype, ...] = ()
) -> None:
    """Check that `value` is a floating-point tensor (or of one of the types in `also`) of this shape on this device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value)}")
    if value.dtype not in (*FLOAT_TYPES, *also):
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device} but the first argument is on {device}")
    _check_dense(op, name, value)


def _check_dense(op: str, name: str, value: Tensor) -> None:
    if value.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be dense, got {value.layout}: pass {name}.to_dense()")


def check_optional(op: str, name: str, value: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """`check_tensor` for an argument that may be None."""
    if value is not None:
        check_tensor(op, name, value, shape, device)


def check_leading(op: str, name: str, value: Tensor, dim: int) -> None:
    """Check the argument the others are measured against: a float tensor of rank `dim`, within int32 offsets."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value)}")
    if value.dim() != dim:
        raise ValueError(f"{op}: {name} must have {dim} dimensions, got shape {tuple(value.shape)}")
    if value.dtype not in FLOAT_TYPES:
        raise ValueError(f"{op}: {name} must be float32, bfloat16, float16 or float64, got {value.dtype}")
    _check_dense(op, name, value)
    if value.numel() > MAX_ELEMENTS:
        raise ValueError(
            f"{op}: {name} has {value.numel()} elements, more than 2**31 - 1: "
            "split the row at a document border and call the op once for each part"
        )


def check_whole(op: str, name: str, value: Any, *, least: int = -(2**63)) -> None:
    """Check a whole number that torch's ops can take: `least` to 2**63 - 1."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be a whole number, got {value!r}")
    if not least <= value < 2**63:
        raise ValueError(f"{op}: {name} must be at least {least} and below 2**63, got {value}")


def check_real(op: str, name: str, value: Any, *, least: float = -MOST, most: float = MOST) -> None:
    """Check a finite number within bounds."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number, got {value!r}")
    if not least <= value <= most:  # NaN is neither
        bounds = "be finite" if (least, most) == (-MOST, MOST) else f"lie in [{least:g}, {most:g}]"
        raise ValueError(f"{op}: {name} must {bounds}, got {value}")


def check_flag(op: str, name: str, value: Any) -> None:
    """Check that it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False, got {value!r}")


def check_slots(
    name: str, state: Tensor, slots: Tensor | None, count: int, shape: tuple[int, int], device: torch.device
) -> None:
    """Check a state (slots, *shape) that is to be changed in place, and the slots of `count` sequences.

    Raises:
        ValueError: a wrong shape, type or device, too few slots, or a state that isn't contiguous.
        TypeError: state is not a tensor.
    """
    check_leading(name, "state", state, 3)
    check_tensor(name, "state", state, (state.shape[0], *shape), device)
    if not state.is_contiguous():
        raise ValueError(f"{name}: state must be contiguous, because it is changed in place: pass state.contiguous()")
    if slots is None:
        if state.shape[0] != count:
            raise ValueError(f"{name}: state has {state.shape[0]} slots for {count} sequences: pass slots too")
    elif not isinstance(slots, Tensor):
        raise TypeError(f"{name}: slots must be a tensor or None, got {type(slots)}")
    elif slots.shape != (count,) or slots.dtype != torch.int64 or slots.device != device:
        raise ValueError(
            f"{name}: slots must be int64 of shape {(count,)} on {device}, "
            f"got {slots.dtype} of shape {tuple(slots.shape)} on {slots.device}"
        )


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a backward pass can follow, so that the op has to keep what it needs for it."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def compute_dtype(value: Tensor) -> torch.dtype:
    """The type of state and arithmetic: float64 for float64 data, else float32."""
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def stored_dtype(value: Tensor, *others: Tensor | None) -> torch.dtype:
    """The type in which C++ on a CPU reads and writes tokens: their own where all share one that it knows.

    Else it is value's `compute_dtype`, which is what is calculated in whatever tokens are stored in.
    """
    shared = all(other is None or other.dtype == value.dtype for other in others)
    known = value.dtype in (torch.float32, torch.float64, torch.bfloat16)
    return value.dtype if shared and known else compute_dtype(value)
