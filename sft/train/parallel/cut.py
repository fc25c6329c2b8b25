"""Where a packed row is cut, and what a rank's share lacks of what went before: known to all ranks, from numbers alone.

A document that a cut goes through is read in parts. What a part needs of the ones before it is a range of the row's
tokens right before the share (for a convolution, a window, the keys of full attention), or the states that the ranks
before have come to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

Range = tuple[int, int]


@dataclass(frozen=True)
class RowCut:
    """A packed row of T tokens, shared by P ranks.

    Attributes:
        borders: `(S + 1,)`, from 0 to T: the documents' borders; documents may be empty.
        cuts: `(P + 1,)`, from 0 to T, never falling: rank r has the tokens cuts[r] to cuts[r + 1] - 1, perhaps none.
    """

    borders: tuple[int, ...]
    cuts: tuple[int, ...]

    @property
    def ranks(self) -> int:
        """How many ranks share the row."""
        return len(self.cuts) - 1

    def share(self, rank: int) -> Range:
        """The rank's tokens."""
        return self.cuts[rank], self.cuts[rank + 1]

    def borders_of(self, rank: int) -> list[int]:
        """Borders of the documents, or parts of them, in a share, from 0: at least one, which may be empty."""
        start, end = self.share(rank)
        inside = self.borders[bisect_right(self.borders, start) :]
        return [0, *sorted({border - start for border in inside if border < end}), end - start]

    def carried(self, rank: int) -> Range:
        """The tokens before a share that belong to its first document; none where it begins with one."""
        start, end = self.share(rank)
        if start == end:
            return start, start
        return self.borders[bisect_right(self.borders, start) - 1], start

    def before(self, reach: int | None = None) -> list[Range]:
        """For each rank the last `reach` of its carried tokens, or all of them."""
        ranges = (self.carried(rank) for rank in range(self.ranks))
        return [(first if reach is None else max(first, end - reach), end) for first, end in ranges]

    def states_before(self) -> list[Range]:
        """For each rank the ranks whose states it starts from: those that hold its carried tokens."""
        found = []
        for rank in range(self.ranks):
            first, end = self.carried(rank)
            found.append((bisect_right(self.cuts, first) - 1, rank) if first < end else (rank, rank))
        return found

    def last_part(self, rank: int) -> int:
        """Where in a share, from 0, the part begins that goes on in the next share; the share's length if none does."""
        start, end = self.share(rank)
        index = bisect_right(self.borders, end) - 1
        goes_on = start < end < self.cuts[-1] and self.borders[index] < end
        return max(self.borders[index] - start, 0) if goes_on else end - start

    def passes_through(self, rank: int) -> bool:
        """Whether a share is nothing but a part of one document that began before it and goes on after it."""
        first, start = self.carried(rank)
        return first < start and self.last_part(rank) == 0


def overlaps(parts: Sequence[int], wanted: Range) -> list[Range]:
    """What lies of a range in each part (given by P + 1 borders), counted from that part's start."""
    found = []
    for start, end in pairwise(parts):
        first, last = max(wanted[0], start), min(wanted[1], end)
        found.append((first - start, last - start) if first < last else (0, 0))
    return found
