"""Which ranks share rows: those of one group, `sequence_parallel_size` ranks with neighbouring numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from typing import Any

from torch import distributed
from torch.utils.data import Sampler

from sft.train.parallel.exchange import Ranks
from sft.utils.distributed import rank, world_size

_groups: dict[Any, list[Any]] = {}
"""The process group of all processes and the size of the groups -> the groups."""


@dataclass(frozen=True)
class DataRanks:
    """Of the ranks that have rows of their own: this one's number, from 0, and how many."""

    number: int
    count: int

    @classmethod
    def of(cls, size: int) -> DataRanks:
        """Those of this run, where `size` ranks share a row."""
        return cls(rank() // size, world_size() // size)


def ranks_of_a_row(size: int) -> Ranks | None:
    """The ranks that share this one's rows; None where each has its own. All ranks must come here together."""
    if size == 1:
        return None
    everyone = distributed.group.WORLD
    if (everyone, size) not in _groups:
        _groups.clear()
        firsts = range(0, distributed.get_world_size(), size)
        _groups[everyone, size] = [distributed.new_group(list(range(first, first + size))) for first in firsts]
    number = distributed.get_rank()
    return Ranks(number % size, size, _groups[everyone, size][number // size])


class SameBlocks(Sampler[int]):
    """What `order` says in blocks of `block`, each block `times` over: accelerate gives blocks to the ranks in turn, so
    that the ranks of a group get the same one. Only whole blocks, which rows are filled up to (`training_rows`).
    """

    def __init__(self, order: Sampler[int], block: int, times: int) -> None:
        self.order, self.block, self.times = order, block, times

    def __len__(self) -> int:
        assert isinstance(self.order, Sized)
        return len(self.order) // self.block * self.block * self.times

    def __iter__(self) -> Iterator[int]:
        block: list[int] = []
        for index in self.order:
            block.append(index)
            if len(block) == self.block:
                yield from block * self.times
                block = []
