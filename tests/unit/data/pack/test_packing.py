"""Packing: every document once, never cut, as full as best-fit decreasing gets."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sft.data.pack.bins import pack


def _slow(lengths: list[int], capacity: int) -> list[int]:
    """Free space after best-fit decreasing, by looking at every row for every document."""
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fits = [i for i, space in enumerate(free) if space >= length]
        if fits:
            free[min(fits, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@given(st.lists(st.integers(1, 20), max_size=60))
def test_is_best_fit_decreasing(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 20)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(lengths)))
    assert sorted(20 - sum(lengths[i] for i in row) for row in rows) == _slow(lengths, 20)
    assert all((np.diff(row) > 0).all() for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_is_the_same_every_time_and_for_equal_lengths() -> None:
    lengths = np.full(10, 3, dtype=np.int64)
    assert [row.tolist() for row in pack(lengths, 10)] == [row.tolist() for row in pack(lengths.copy(), 10)]


@pytest.mark.parametrize("lengths", [[0, 1], [5, 11]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 10"):
        pack(np.array(lengths, dtype=np.int64), 10)


def test_is_near_linear() -> None:
    random = np.random.default_rng(0)

    def seconds(n: int) -> float:
        lengths = np.minimum(random.lognormal(8, 1, n).astype(np.int64) + 1, 32768)
        start = time.process_time()
        rows = pack(lengths, 32768)
        taken = time.process_time() - start
        assert lengths.sum() / (len(rows) * 32768) > 0.99
        return taken

    small, large = seconds(5_000), seconds(50_000)
    assert large < 40 * small + 1.0
