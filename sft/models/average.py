"""The average of model folders, tensor by tensor and bit by bit: in float64, rounded once to what the tensors are in.

Files are read and never mapped, so that memory holds a few pieces of tensors whatever the size of the models.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.models.checkpoint import check_safetensors
from sft.models.merge import FinalTensor
from sft.models.save import STORED_TYPES, write_safetensors
from sft.utils.errors import UserError

WEIGHT_FILES = ("model*.safetensors", "adapter_model.safetensors")

PIECE = 1 << 23
"""Values that are averaged at once: a few times 64 MB."""


@dataclass(frozen=True)
class Average:
    """Folders whose weights count the same, and the stage's start, whose weight is what `weight` leaves of 1.

    Without folders the start is averaged with the weights that are there already.
    """

    folders: Sequence[Path] = ()
    start: Path | None = None
    weight: float = 1.0


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: torch.Size
    begin: int

    def read(self, first: int, count: int) -> Tensor:
        """Values of the flat tensor, (count,)."""
        buffer = bytearray(count * self.dtype.itemsize)
        with open(self.path, "rb") as handle:
            handle.seek(self.begin + first * self.dtype.itemsize)
            if handle.readinto(buffer) != len(buffer):
                raise UserError(f"{self.path} is cut off: copy it again.")
        return torch.frombuffer(buffer, dtype=self.dtype)


def average_into(target: Path, average: Average) -> None:
    """Give the weights in the folder `target` the average's values; their names and shapes stay, and their types, or
    those of the start where it takes part: they may lie there wider than they are handed on.

    Raises:
        UserError: when a folder lacks a tensor, or has one of another shape, or its files are cut off.
    """
    own = [_stored(folder) for folder in average.folders or [target]]
    start = None if average.start is None else _stored(average.start)

    def final(name: str, there: _Stored) -> FinalTensor:
        others, other = [_of(found, name, there) for found in own], _of(start, name, there) if start else None
        dtype = there.dtype if other is None else other.dtype
        pieces = partial(_pieces, replace(there, dtype=dtype), others, other, average.weight)
        return FinalTensor(there.shape, dtype, True, lambda: torch.cat(list(pieces())).view(there.shape), pieces)

    for path in sorted(found for pattern in WEIGHT_FILES for found in target.glob(pattern)):
        tensors = {name: final(name, there) for name, there in _tensors(path).items()}
        temporary = path.with_name(f".{path.name}.averaged")
        write_safetensors(temporary, tensors)
        os.replace(temporary, path)


def _pieces(there: _Stored, own: list[_Stored], start: _Stored | None, weight: float) -> Iterator[Tensor]:
    for first in range(0, there.shape.numel(), PIECE):
        count = min(PIECE, there.shape.numel() - first)
        if not there.dtype.is_floating_point:
            yield own[-1].read(first, count)
            continue
        total = own[0].read(first, count).double()
        for other in own[1:]:
            total += other.read(first, count)
        total /= len(own)
        if start is not None:
            total = weight * total + (1.0 - weight) * start.read(first, count).double()
        yield rounded_once(total, there.dtype)


def rounded_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """float64 `values` in `dtype`, each the nearest there (ties to even): torch goes by float32 and rounds twice.

    The way through float32 is exact if it is rounded to odd (Boldo and Melquiond 2008): cut off, with the last bit set
    where anything was lost.
    """
    if dtype in (torch.float64, torch.float32):
        return values.to(dtype)
    near = values.float()
    lost, above = near.double() != values, near.double().abs() > values.abs()
    bits = near.view(torch.int32)
    odd = torch.where(lost, (bits - above.int()) | 1, bits)
    return odd.view(torch.float32).to(dtype)


def _stored(folder: Path) -> dict[str, _Stored]:
    """The tensors of all weight files of a folder, by name."""
    files = sorted(path for pattern in WEIGHT_FILES for path in folder.glob(pattern))
    if not files:
        raise UserError(f"{folder} holds no weights to average.")
    return {name: tensor for path in files for name, tensor in _tensors(path).items()}


def _tensors(path: Path) -> dict[str, _Stored]:
    with open(path, "rb") as handle:
        data = 8 + int.from_bytes(handle.read(8), "little")

    def stored(entry: Any) -> _Stored:
        return _Stored(path, STORED_TYPES[entry["dtype"]], torch.Size(entry["shape"]), data + entry["data_offsets"][0])

    return {name: stored(entry) for name, entry in check_safetensors(path).items()}


def _of(found: dict[str, _Stored], name: str, there: _Stored) -> _Stored:
    """The tensor of the same name in another folder."""
    tensor = found.get(name)
    if tensor is None or tensor.shape != there.shape:
        where = next(iter(found.values())).path.parent
        what = "has none" if tensor is None else f"has one of shape {list(tensor.shape)}"
        raise UserError(f"{name} of shape {list(there.shape)} can't be averaged: {where} {what}.")
    return tensor
