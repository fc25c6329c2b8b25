"""The most memory that something takes."""

from __future__ import annotations

import gc
from pathlib import Path
from types import TracebackType

import torch

from sft.utils.memory import give_back_freed_memory

_PROCESS = Path("/proc/self")


class Peak:
    """A context; by how much it took more at its peak than before: of a GPU, or of the process.

    Attributes:
        bytes: that, at its end; 0 on a CPU where the system isn't Linux or doesn't let the peak be reset.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.bytes = device, 0

    def __enter__(self) -> Peak:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            give_back_freed_memory()  # what is used again wouldn't be seen
            self._before = _reset()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self._before
        elif self._before:
            self.bytes = _peak() - self._before


def _reset() -> int:
    """Let the process's peak be its present size, and return that; 0 where it can't be (proc(5), clear_refs)."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return 0
    return _peak()


def _peak() -> int:
    status = (_PROCESS / "status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
