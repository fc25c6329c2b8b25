"""Packed rows: several documents in one row, their borders in `cu_seqlens`.

`cu_seqlens` is int32 of shape (S+1,): document s owns tokens cu_seqlens[s] to cu_seqlens[s+1] - 1; it may be empty.
None means one document. The checks come in two halves, because shapes are known when a graph is traced and values only
when it runs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

MAX_ELEMENTS = 2**31 - 1


def document_count(cu_seqlens: Tensor | None) -> int:
    """Number of documents S in a packed row; None stands for one document."""
    return 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1


def check_cu_seqlens_form(cu_seqlens: Tensor | None, device: torch.device, *, name: str = "cu_seqlens") -> None:
    """Check type, rank, size and device of `cu_seqlens`; reads no values, so it may be traced.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it is not int32, not one-dimensional, empty, or on another device than the data.
    """
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor of shape (documents + 1,) or None, got {type(cu_seqlens)}")
    if cu_seqlens.dtype != torch.int32:
        raise ValueError(f"{name} must be int32, got {cu_seqlens.dtype}: pass {name}.to(torch.int32)")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (documents + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device:
        raise ValueError(f"{name} is on {cu_seqlens.device} but the data is on {device}: move it there first")


def check_cu_seqlens_values(cu_seqlens: Tensor | None, total: int, *, name: str = "cu_seqlens") -> None:
    """Check that `cu_seqlens` starts at 0, never decreases and ends at `total` tokens.

    Values on an accelerator are not read: that would make the host wait for the device.

    Raises:
        ValueError: one of the three does not hold.
    """
    if cu_seqlens is None or cu_seqlens.device.type != "cpu":
        return
    borders = cu_seqlens.tolist()  # at once: each operation of torch takes as long as a hundred comparisons
    if borders[0] != 0:
        raise ValueError(f"{name} must start at 0, got {borders[0]}")
    if borders[-1] != total:
        raise ValueError(f"{name} must end at the number of tokens, {total}, got {borders[-1]}")
    if any(stop < start for start, stop in pairwise(borders)):
        raise ValueError(f"{name} must not decrease, got {borders}")
