"""The most memory that something takes."""

from __future__ import annotations

import gc
from threading import Event, Thread
from types import TracebackType

import torch

from sft.utils.memory import give_back_freed_memory

_EVERY = 0.02


class Peak:
    """A context; by how much it took more at its peak than before: of a GPU, or of the process.

    Attributes:
        bytes: that, at its end.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0
        self._ended = Event()
        self._watcher = Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            give_back_freed_memory()  # what is used again wouldn't be seen
            self._before = _resident()
            self._watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
            return
        self._look()
        self._ended.set()
        self._watcher.join(timeout=10)

    def _watch(self) -> None:
        while not self._ended.wait(_EVERY):
            self._look()

    def _look(self) -> None:
        self.bytes = max(self.bytes, _resident() - self._before)


def _resident() -> int:
    import psutil

    return int(psutil.Process().memory_info().rss)
