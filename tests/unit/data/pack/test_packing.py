"""Packing: every document once, never cut, rows of mixed lengths unless that takes notably more of them."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_limit import at_most
from hypothesis import given, settings
from hypothesis import strategies as st

from sft.data.pack.bins import MORE, pack


def _slow(lengths: list[int], capacity: int) -> list[int]:
    """Free space after best fit in this order, by looking at every row for every document."""
    free: list[int] = []
    for length in lengths:
        fits = [i for i, space in enumerate(free) if space >= length]
        if fits:
            free[min(fits, key=lambda i: free[i])] -= length
        else:
            free.append(capacity - length)
    return sorted(free)


@settings(deadline=None)
@given(st.lists(st.integers(1, 20), max_size=60))
def test_is_best_fit_in_random_order_or_longest_first(lengths: list[int]) -> None:
    rows = pack(np.array(lengths, dtype=np.int64), 20)
    assert sorted(i for row in rows for i in row.tolist()) == list(range(len(lengths)))
    mixed = _slow([lengths[i] for i in np.random.default_rng(0).permutation(len(lengths))], 20)
    fewest = _slow(sorted(lengths, reverse=True), 20)
    expected = mixed if len(mixed) <= MORE * len(fewest) else fewest
    assert sorted(20 - sum(lengths[i] for i in row) for row in rows) == expected
    assert all((np.diff(row) > 0).all() for row in rows)
    assert [row[0] for row in rows] == sorted(row[0] for row in rows)


def test_rows_are_of_mixed_lengths() -> None:
    """Two sources of unlike lengths, one after the other: about every row has documents of both."""
    random = np.random.default_rng(0)
    short, long = random.integers(80, 150, 3000), random.integers(300, 480, 700)
    rows = pack(np.concatenate([short, long]), 1024)
    assert sum(row[0] < 3000 <= row[-1] for row in rows) > 0.8 * len(rows)
    assert len(rows) <= MORE * (len(_slow(sorted([*short, *long], reverse=True), 1024)) + 1)


def test_rows_are_of_equal_lengths_where_that_saves_many() -> None:
    lengths = np.random.default_rng(0).integers(1200, 2400, 2000)
    assert len(pack(lengths, 4096)) == len(_slow(sorted(lengths.tolist(), reverse=True), 4096))


def test_is_the_same_every_time_and_for_equal_lengths() -> None:
    lengths = np.full(10, 3, dtype=np.int64)
    assert [row.tolist() for row in pack(lengths, 10)] == [row.tolist() for row in pack(lengths.copy(), 10)]


@pytest.mark.parametrize("lengths", [[0, 1], [5, 11]])
def test_impossible_lengths_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="1 to 10"):
        pack(np.array(lengths, dtype=np.int64), 10)


def test_is_near_linear() -> None:
    lengths = np.minimum(np.random.default_rng(0).lognormal(8, 1, 50_000).astype(np.int64) + 1, 32768)
    with at_most(cpu_seconds=30):
        rows = pack(lengths, 32768)
    assert lengths.sum() / (len(rows) * 32768) > 0.99
