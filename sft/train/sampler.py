"""The order of rows: a function of seed and epoch alone, so that a resumed run, at any process, sees the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class EpochOrder(Sampler[int]):
    """A fresh permutation of `rows` row numbers for each epoch, the same on every process.

    With `lengths` (tokens of each row), rows of similar length come together in groups of `group` (transformers'
    group_by_length). The trainer says which epoch it is: accelerate loses count when a run resumes inside one.
    """

    def __init__(self, rows: int, *, seed: int, lengths: Sequence[int] | None = None, group: int = 1) -> None:
        self.rows, self.seed, self.lengths, self.group = rows, seed, lengths, group
        self.current_epoch = 0

    def __len__(self) -> int:
        return self.rows

    def __iter__(self) -> Iterator[int]:
        return iter(self.of_epoch(self.current_epoch))

    def of_epoch(self, epoch: int) -> list[int]:
        """The row numbers in the order of an epoch."""
        state = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
        if self.lengths is None:
            return torch.randperm(self.rows, generator=generator).tolist()
        from transformers.trainer_pt_utils import get_length_grouped_indices

        return get_length_grouped_indices(self.lengths, self.group, generator=generator)
