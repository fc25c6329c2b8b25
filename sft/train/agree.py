"""Small numbers that all processes must agree on, exchanged between hosts: the GPUs' work is never waited for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import distributed

from sft.utils.distributed import WAIT

_host: dict[Any, Any] = {}
"""The process group of all processes -> one of the same processes that works on the CPU."""


def over_processes(values: Sequence[int], operation: Any = None) -> list[int]:
    """`values`, each summed (or reduced by `operation`, such as distributed.ReduceOp.MAX) over all processes.

    Every process must call this with as many values.
    """
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return list(values)
    shared = torch.tensor(values, dtype=torch.int64)
    distributed.all_reduce(shared, op=operation or distributed.ReduceOp.SUM, group=_group())
    return shared.tolist()


def sum_over_processes(value: float) -> float:
    """`value` summed over all processes, correctly rounded: the same number on each, whatever their order."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return value
    return math.fsum(part[0] for part in on_processes([value]))


def on_processes(values: Sequence[float]) -> list[list[float]]:
    """`values` of each process, by its number. Every process must call this with as many."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return [list(values)]
    mine = torch.tensor(values, dtype=torch.float64)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size())]
    distributed.all_gather(everyone, mine, group=_group())
    return [part.tolist() for part in everyone]


def _group() -> Any:
    everyone = distributed.group.WORLD
    if distributed.get_backend(everyone) == "gloo":
        return everyone
    if everyone not in _host:
        _host.clear()
        _host[everyone] = distributed.new_group(backend="gloo", timeout=WAIT)
    return _host[everyone]
