"""Inputs of checkpointed blocks in the host's memory: what waits on the device no longer grows with the depth."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks


class BlockInputs:
    """Calls blocks through their checkpoint function so that each one's first input waits in the host's memory.

    That is the stream of hidden states, the one input that every block has of its own: what several blocks read stays,
    once, where it is. Each input leaves while its block computes, and comes back while the block above goes through its
    backward pass: one is on its way and one in use, whatever the depth. On a GPU the copies go through pinned memory on
    a stream of their own. They are exact, so gradients are the same bits.
    """

    def __init__(self) -> None:
        self._links: dict[torch.device, Link] = {}
        self._last: Callable[[], Waiting | None] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockInputs:
        return self  # streams can't be copied, and a copy of the model may use the same

    def call(self, checkpoint: Callable[..., Any], block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`checkpoint(block, *args, **kwargs)`, non-reentrant."""
        if not args or not isinstance(args[0], Tensor):
            return checkpoint(block, *args, **kwargs)
        carried = _place(args[0])  # no tensor: who is packed holds on to what packs it

        def pack(tensor: Tensor) -> Tensor | Waiting:
            return self._sent(tensor) if _place(tensor) == carried else tensor

        with saved_tensors_hooks(pack, _unpack):
            return checkpoint(block, *args, **kwargs)

    def _sent(self, tensor: Tensor) -> Waiting:
        device = tensor.device
        if device not in self._links:
            self._links[device] = GpuLink(device) if device.type == "cuda" else Link(device)
        waiting = Waiting(tensor, self._links[device], self._last)
        self._last = weakref.ref(waiting)
        return waiting


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """What tells a tensor from all others that are alive, however it is seen."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.dtype


def _unpack(kept: Tensor | Waiting) -> Tensor:
    return kept.bring() if isinstance(kept, Waiting) else kept


class Waiting:
    """A tensor in the host's memory, and the one that was sent before it, which the backward pass wants after it."""

    def __init__(self, tensor: Tensor, link: Link, before: Callable[[], Waiting | None]) -> None:
        self._held, self._link, self._before = link.send(tensor), link, before
        self._coming: Any = None

    def bring(self) -> Tensor:
        """The tensor, on its device; the one before it is on its way from now on."""
        self.fetch()
        coming, self._coming = self._coming, None
        before = self._before()
        if before is not None:
            before.fetch()
        return self._link.arrived(coming)

    def fetch(self) -> None:
        """Send it on its way back, unless it is."""
        if self._coming is None:
            self._coming = self._link.fetch(self._held)


class Link:
    """Copies between a device and the host's memory that are done when the call returns."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def send(self, tensor: Tensor) -> Any:
        """A copy in the host's memory."""
        return tensor.to("cpu", copy=True)

    def fetch(self, held: Any) -> Any:
        """A copy on the device, on its way."""
        return held.to(self.device, copy=True)

    def arrived(self, coming: Any) -> Tensor:
        """That copy, to be used from now on."""
        tensor: Tensor = coming
        return tensor


class GpuLink(Link):
    """Copies through pinned memory beside the computation; who computes waits on the GPU, and the host never."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)

    def send(self, tensor: Tensor) -> Any:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        held = torch.empty_like(tensor, device="cpu", pin_memory=True)
        with torch.cuda.stream(self._stream):
            held.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)  # its memory is free once the copy is done
        return held

    def fetch(self, held: Any) -> Any:
        with torch.cuda.stream(self._stream):
            coming = torch.empty_like(held, device=self.device)
            coming.copy_(held, non_blocking=True)
            return coming, self._stream.record_event()

    def arrived(self, coming: Any) -> Tensor:
        tensor, copied = coming
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(copied)
        tensor.record_stream(stream)
        return tensor
