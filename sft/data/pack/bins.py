"""Best-fit packing: whole documents into rows of at most `capacity` tokens, of all lengths in every row.

Each document goes to the row with the least space that still holds it. Longest first, that takes at most 11/9 of the
fewest rows possible, asymptotically (Johnson 1974), but a row's documents then have about one length, and so has a
step's batch: what long documents teach and what short ones teach take turns, and less is learned. So documents come in
random order, unless that takes notably more rows. Documents are never cut.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from numpy.typing import NDArray

MORE = 1.02
"""At most so many times the rows that longest first takes are spent on rows of mixed lengths."""


def pack(lengths: NDArray[np.int64], capacity: int) -> list[NDArray[np.int64]]:
    """Documents of each row, as ascending indices into `lengths`; rows are in the order of their first document.

    `lengths` (n,) are token counts, each between 1 and `capacity` (else ValueError). Deterministic; O(n log capacity)
    plus the shifts of one list of at most `capacity` numbers, 2 to 4 seconds for a million documents.
    """
    if len(lengths) == 0:
        return []
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"document lengths must be 1 to {capacity}, found {lengths.min()} to {lengths.max()}")
    row_of = _assign(lengths, capacity, np.random.default_rng(0).permutation(len(lengths)))
    if row_of.max() + 1 > MORE * lengths.sum() / capacity:  # else no order takes notably fewer
        fewest = _assign(lengths, capacity, np.argsort(-lengths, kind="stable"))
        row_of = row_of if row_of.max() + 1 <= MORE * (fewest.max() + 1) else fewest
    first = np.full(row_of.max() + 1, len(lengths), dtype=np.int64)
    np.minimum.at(first, row_of, np.arange(len(lengths)))
    by_row = np.argsort(first[row_of], kind="stable")  # rows by first document, documents ascending within each
    counts = np.bincount(row_of)[np.argsort(first, kind="stable")]
    return np.split(by_row, np.cumsum(counts)[:-1])


def _assign(lengths: NDArray[np.int64], capacity: int, order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The row of each document, when they come in this order."""
    row_of = np.empty(len(lengths), dtype=np.int64)
    rows_with: dict[int, list[int]] = {}  # free space -> rows that have exactly this much
    spaces: list[int] = []  # the keys of rows_with, ascending
    rows = 0
    for index, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        at = bisect_left(spaces, length)
        if at == len(spaces):
            row, space = rows, capacity
            rows += 1
        else:
            space = spaces[at]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del rows_with[space], spaces[at]
        row_of[index] = row
        left = space - length
        if left in rows_with:
            rows_with[left].append(row)
        elif left:
            rows_with[left] = [row]
            insort(spaces, left)
    return row_of
