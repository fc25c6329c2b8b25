"""Cutting packed documents into segments that programs of a GPU work on side by side.

A recurrence runs through a document token by token. One long document would keep a few programs busy for long, so it
is cut: every segment first runs on its own, the states at the cuts are then carried along, and each segment runs again
from its true state. A segment lies in one document, so nothing inside the loops has to look for borders.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import Tensor

from .packing import document_count

ENOUGH_PROGRAMS = 8192  # several times what a GPU holds at once: uneven documents leave no multiprocessor idle for long
LONGEST, SHORTEST = 4096, 256  # tokens in a segment


class Segments(NamedTuple):
    """Segments of a packed row, in order; int32 tensors on the row's device.

    Attributes:
        start, end: (n,) tokens start to end - 1; unused entries at the end of the plan are empty, 0 to 0.
        document: (n,) the document a segment lies in; -1 for unused entries.
        first: (S+1,) the first segment of each document, and how many are used. Every document has at least one.
        borders: (S+1,) cu_seqlens.
    """

    start: Tensor
    end: Tensor
    document: Tensor
    first: Tensor
    borders: Tensor


def power_of_two(value: int) -> int:
    """The smallest power of two that is not below value."""
    return 1 << max(0, value - 1).bit_length()


def segment_length(total: int, channels: int, block: int) -> int:
    """Tokens in a segment, a power of two: long, for a cut costs a second pass, but short enough to fill the GPU.

    Args:
        total: tokens in the packed row.
        channels: of the recurrence.
        block: channels that one program handles.
    """
    length, tiles = LONGEST, max(1, -(-channels // block))
    while length > SHORTEST and (total // length) * tiles < ENOUGH_PROGRAMS:
        length //= 2
    return length


def segments(cu_seqlens: Tensor | None, total: int, length: int, device: torch.device) -> Segments:
    """Cut the documents of a packed row into segments of `length` tokens (the last of a document may be shorter).

    The number of entries depends on shapes alone, total // length + S, so the host never waits for the device. Every
    layer asks for the same few plans: on a GPU they are kept (:class:`Plans`).

    Args:
        cu_seqlens: int32 (S+1,) document borders; None = one document.
        total: tokens in the packed row.
    """
    if cu_seqlens is None or not Plans.may_keep(cu_seqlens):
        return _cut(cu_seqlens, total, length, device)
    return _plans.find(cu_seqlens, total, length)


def _cut(cu_seqlens: Tensor | None, total: int, length: int, device: torch.device) -> Segments:
    count = document_count(cu_seqlens)
    borders = torch.arange(2, dtype=torch.int32, device=device) * total if cu_seqlens is None else cu_seqlens
    pieces = ((borders.diff() + (length - 1)) // length).clamp_min(1)
    first = torch.nn.functional.pad(pieces.cumsum(0, dtype=torch.int32), (1, 0))
    index = torch.arange(total // length + count, dtype=torch.int32, device=device)
    document = torch.searchsorted(first, index, right=True, out_int32=True) - 1
    used = document < count
    inside = document.clamp_max(max(count - 1, 0)).long()
    start = borders[inside] + (index - first[inside]) * length
    end = torch.minimum(start + length, borders[inside + 1])
    return Segments(
        torch.where(used, start, 0),
        torch.where(used, end, 0),
        torch.where(used, document, -1),
        first,
        borders,
    )


class Plans:
    """The plans that were made last, by the borders' place in memory, which stays theirs while a plan is kept.

    Borders that were changed in place since, by the version that torch counts, are cut anew.
    """

    MOST = 16

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[int, ...], tuple[Tensor, int, Segments]] = OrderedDict()

    @staticmethod
    def may_keep(cu_seqlens: Tensor) -> bool:
        """On a GPU, where a plan takes a dozen launches; not while a graph is captured, which has to hold them all."""
        return cu_seqlens.is_cuda and not cu_seqlens.is_inference() and not torch.cuda.is_current_stream_capturing()

    def find(self, cu_seqlens: Tensor, total: int, length: int) -> Segments:
        """The plan for these borders, made on the current stream."""
        stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream if cu_seqlens.is_cuda else 0
        key = (cu_seqlens.data_ptr(), cu_seqlens.numel(), cu_seqlens.stride(0), total, length, stream)
        kept = self._kept.get(key)
        if kept is None or kept[1] != cu_seqlens._version:
            kept = cu_seqlens, cu_seqlens._version, _cut(cu_seqlens, total, length, cu_seqlens.device)
            self._kept[key] = kept
            while len(self._kept) > self.MOST:
                self._kept.popitem(last=False)
        return kept[2]


_plans = Plans()
