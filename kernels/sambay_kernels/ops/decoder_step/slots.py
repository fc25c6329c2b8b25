"""Where the states of sequences live while they are decoded: everything is allocated once and changed in place."""

from __future__ import annotations

import math
import mmap
from typing import NamedTuple

import torch
from torch import Tensor

from .weights import DecoderWeights

_LARGE = 1 << 20  # bytes


class Attended(NamedTuple):
    """What one layer's attention reads: keys and values (places, key heads, page_size, head_dim) of all sequences.

    Attributes:
        rows: (R,) int64, the slots that take part.
        window: tokens that a sequence sees; its place is then its slot and its page a ring. 0: all, as the table lists.
    """

    keys: Tensor
    values: Tensor
    rows: Tensor
    lengths: Tensor
    table: Tensor
    window: int


class Slots:
    """The states of up to `slots` sequences.

    A sequence has a slot: the states of the Mamba layers, and for every window layer a ring of the last `window` keys
    and values (token t stands at t mod window: without positions their order is of no consequence). The layers that
    see everything keep keys and values in pages, which a slot's row of the table lists in the order of its tokens;
    several slots may list the same page as long as none of them writes to it.

    Attributes:
        conv: (Mamba layers, slots, inner, width - 1), the last inputs, oldest first.
        scan: (Mamba layers, slots, inner, states), float32 (float64 for float64).
        ring_keys, ring_values: (window layers, slots, key heads, window, head_dim).
        page_keys, page_values: (full layers, pages, key heads, page_size, head_dim).
        table: (slots, most pages of a sequence), int32.
        lengths: (slots,), int32, how many tokens a sequence holds.
    """

    def __init__(
        self, weights: DecoderWeights, *, slots: int, pages: int, page_size: int, longest: int, dtype: torch.dtype
    ) -> None:
        device = weights.embed.device
        mamba, window = weights.mambas[0], max((m.window or 0 for m in weights.windows), default=0)
        inner, states = mamba.A.shape
        heads, width = weights.key_heads, weights.head_dim
        self.page_size = page_size

        def room(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return _zeros(shape, kind, device)

        self.conv = room(len(weights.mambas), slots, inner, mamba.conv_weight.shape[1] - 1)
        self.scan = room(len(weights.mambas), slots, inner, states, kind=mamba.A.dtype)
        self.ring_keys = room(len(weights.windows), slots, heads, window, width)
        self.ring_values = room(*self.ring_keys.shape)
        self.page_keys = room(len(weights.full), pages, heads, page_size, width)
        self.page_values = room(*self.page_keys.shape)
        self.table = room(slots, -(-longest // page_size), kind=torch.int32)
        self.lengths = room(slots, kind=torch.int32)

    def clear_slot(self, slot: int) -> None:
        """Begin a sequence in `slot` that holds no token."""
        for tensor in (self.conv, self.scan):
            tensor[:, slot] = 0
        self.lengths[slot] = 0

    def copy_slot(self, source: int, target: int) -> None:
        """Give the sequence in `target` the states, rings and length of `source`. Its pages are the caller's."""
        for tensor in (self.conv, self.scan, self.ring_keys, self.ring_values):
            tensor[:, target] = tensor[:, source]
        self.lengths[target] = self.lengths[source]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.zeros; on a CPU large ones take no memory, and no time, where nothing is written yet."""
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE:
        return torch.zeros(shape, dtype=dtype, device=device)
    return torch.frombuffer(mmap.mmap(-1, size), dtype=dtype).view(shape)
