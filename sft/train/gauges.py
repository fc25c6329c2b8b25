"""How well the processes are used while a stage trains: share of the peak rate, memory, waits for rows, skew."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from sft.train.agree import on_processes

PEAKS = {
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "A6000": 155e12,
    "L4": 121e12,
    "A10G": 70e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
}
"""Products and sums of bfloat16 a second, dense, with float32 sums, as NVIDIA's data sheets say, by what a card's name
holds; the first that fits counts."""


def peak_rate(card: str) -> float | None:
    """What a card can do at most, in operations a second; None where that isn't known."""
    return next((rate for name, rate in PEAKS.items() if name in card), None)


class Gauges:
    """Sums since the last line of the log, on this process."""

    def __init__(self, device: torch.device, *, per_token: float, forward_is_alone: bool) -> None:
        """`per_token`: operations of a token's forward and backward pass; `forward_is_alone`: whether a forward pass
        waits for no other process, so that its time tells who is slow."""
        self._device, self._per_token, self._alone = device, per_token, forward_is_alone
        self._cuda = device.type == "cuda"
        self._peak = peak_rate(torch.cuda.get_device_name(device)) if self._cuda else None
        self._waited = self._computed = 0.0
        self._events: list[tuple[Any, Any]] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Rows are waited for."""
        begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - begun

    @contextmanager
    def computing(self) -> Iterator[None]:
        """A forward pass."""
        if self._cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            begun = time.perf_counter()
            yield
            self._computed += time.perf_counter() - begun

    def read(self, tokens: float, seconds: float) -> dict[str, float]:
        """The numbers of a line of the log, over `tokens` of all processes in `seconds`; begins anew. On all processes.

        `data_wait`: seconds that the process waited which waited longest; `memory_gib`: most memory that a process had;
        `skew`: the forward passes' time of the slowest process by that of the fastest; `mfu`: the share of the cards'
        peak rate that the model's own operations make up.
        """
        for begin, end in self._events:
            end.synchronize()
            self._computed += begin.elapsed_time(end) / 1e3
        found = on_processes([self._waited, self._computed, self._memory()])
        waits, times, memories = zip(*found, strict=True)
        told = {"data_wait": round(max(waits), 4), "memory_gib": round(max(memories) / (1 << 30), 3)}
        if self._alone and len(times) > 1 and min(times) > 0:
            told["skew"] = round(max(times) / min(times), 3)
        if self._peak and seconds > 0:
            told["mfu"] = round(self._per_token * tokens / seconds / (self._peak * len(found)), 4)
        self._waited = self._computed = 0.0
        self._events.clear()
        return told

    def _memory(self) -> float:
        if self._cuda:
            most = float(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            return most
        unit = 1 if sys.platform == "darwin" else 1024
        return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
