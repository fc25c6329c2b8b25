"""The order of rows: a function of seed and epoch alone, so that a resumed run, at any process, sees the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Sampler


class Balance(NamedTuple):
    """How a step's rows are dealt out: `rows` to a micro-batch, one of which each of `processes` runs at a time."""

    rows: int
    processes: int


class EpochOrder(Sampler[int]):
    """A fresh permutation of `rows` row numbers for each epoch, the same on every process.

    With `lengths` (tokens of each row), rows of similar length come together in groups of `group` (transformers'
    group_by_length) where `grouped`; with `balance`, the rows of each optimizer step, `group` of them, which stay the
    same, are in an order in which processes that take turns have as much to do (`balanced`). The trainer says which
    epoch it is: accelerate loses count when a run resumes inside one.
    """

    def __init__(
        self,
        rows: int,
        *,
        seed: int,
        lengths: Sequence[int] | None = None,
        group: int = 1,
        grouped: bool = True,
        balance: Balance | None = None,
    ) -> None:
        self.rows, self.seed, self.lengths, self.group = rows, seed, lengths, group
        self.grouped, self.balance = grouped and lengths is not None, balance
        self.current_epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.of_epoch(self.current_epoch))

    def of_epoch(self, epoch: int) -> list[int]:
        """The row numbers in the order of an epoch."""
        order = self._drawn(epoch)
        if self.balance is None or self.lengths is None:
            return order
        steps = [order[start : start + self.group] for start in range(0, len(order), self.group)]
        return [row for step in steps for row in balanced(step, self.lengths, self.balance)]

    def _drawn(self, epoch: int) -> list[int]:
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        if not self.grouped:
            return torch.randperm(self.rows, generator=generator).tolist()
        from transformers.trainer_pt_utils import get_length_grouped_indices

        return get_length_grouped_indices(self.lengths, self.group, generator=generator)


def balanced(step: Sequence[int], lengths: Sequence[int], balance: Balance) -> list[int]:
    """The rows of an optimizer step in another order: micro-batch by micro-batch, and in it process by process.

    The micro-batches that run side by side hold rows of similar length, the longest first, so that none waits long for
    another where gradients are shared after each (ZeRO-2 and ZeRO-3); each longest row goes to the process that has
    least so far, so that they are done together where gradients are shared once a step (DDP, ZeRO-1). A step that isn't
    full stays as it is.
    """
    side_by_side = balance.rows * balance.processes
    if len(step) % side_by_side:
        return list(step)
    longest_first = sorted(step, key=lambda row: (-lengths[row], row))
    dealt: list[int] = []
    done = [0] * balance.processes
    for start in range(0, len(step), side_by_side):
        hands: list[list[int]] = [[] for _ in range(balance.processes)]
        for row in longest_first[start : start + side_by_side]:
            free = [number for number, hand in enumerate(hands) if len(hand) < balance.rows]
            least = min(free, key=lambda number: (done[number], number))
            hands[least].append(row)
            done[least] += lengths[row]
        dealt += [row for hand in hands for row in hand]
    return dealt


def row_lengths(dataset: Any) -> list[int]:
    """The tokens of each prepared row."""
    column = dataset.with_format("arrow")[:].column("seq_lengths")
    found = []
    for chunk in column.chunks:
        ends = np.concatenate([[0], np.cumsum(chunk.flatten().to_numpy(), dtype=np.int64)])
        offsets = np.asarray(chunk.offsets) - chunk.offsets[0].as_py()
        found.append(ends[offsets[1:]] - ends[offsets[:-1]])
    return np.concatenate(found).tolist() if found else []
