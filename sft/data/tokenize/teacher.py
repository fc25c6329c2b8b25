"""Where a teacher's tokens stand in a document, and so which of its supervised tokens the teacher says more about."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from sft.data.read.record import TeacherTokens, Tokens, TopLogprobs

_CUT_TOKENS = 16  # at the end of a text that wasn't read to its end they may be others than in the whole
_GAP_TOKENS = 8  # tags and white space that a data set puts between what a teacher wrote
_LONG = 16  # tokens that stand in a text but where they were written: a shorter stretch may be there by chance


def aligned(tokens: Tokens, said: TeacherTokens, whole: bool = True) -> TopLogprobs | int:
    """The teacher's likeliest tokens at each supervised token of a document, or which of its tokens isn't there.

    Each stretch of the teacher's tokens must stand in the last trained answer as it is, one behind the other: the same
    tokens. The first and the last of a stretch needn't, since there a tokenizer may join what the teacher had apart
    (a thought's end and the tag behind it). Where the teacher says nothing the ids are -1.

    Args:
        whole: whether the text was read to its end; where it wasn't, the teacher's tokens may go on.
    """
    end = int(np.flatnonzero(tokens.mask)[-1]) + 1 if tokens.supervised else 0
    gaps = np.flatnonzero(tokens.mask[:end] == 0)
    position = int(gaps[-1]) + 1 if len(gaps) else 0
    of_token = np.full(len(tokens.ids), -1, np.int64)  # which of the teacher's places each token is
    for start, stop in _stretches(said.tokens):
        found = _found(tokens.ids, said.tokens[start:stop], position, whole)
        if isinstance(found, int):
            return start + found
        skipped, place, count = found
        of_token[place : place + count] = np.arange(start + skipped, start + skipped + count)
        position = place + count
    which = of_token[tokens.mask.astype(bool)]
    spoken = (which >= 0)[:, None]
    top = said.top
    return TopLogprobs(np.where(spoken, top.ids[which], -1), np.where(spoken, top.logprobs[which], np.float16(0)))


def _stretches(tokens: NDArray[np.int32]) -> list[tuple[int, int]]:
    """[start, end) of what stands between tokens that have no place in the text (-1)."""
    inside = np.concatenate([[False], tokens >= 0, [False]])
    borders = np.flatnonzero(inside[1:] != inside[:-1])
    return list(zip(borders[::2].tolist(), borders[1::2].tolist(), strict=True))


def _found(
    ids: NDArray[np.int32], stretch: NDArray[np.int32], position: int, whole: bool
) -> tuple[int, int, int] | int:
    """(tokens of the stretch that are skipped, place of the next, how many stand there), or the first that doesn't."""
    count = len(stretch)
    for first, last in ((0, count), (0, count - 1), (1, count), (1, count - 1)):
        if last > first or count == 1:
            place = _place(ids, stretch[first:last], position)
            if place is not None and (place - position <= _GAP_TOKENS or last - first >= _LONG):
                return first, place, last - first
    longest = bisect_left(range(1, count), True, key=lambda many: _place(ids, stretch[:many], position) is None)
    place = _place(ids, stretch[:longest], position)
    if not whole and place is not None and place + longest >= len(ids) - _CUT_TOKENS:
        return 0, place, longest
    return longest


def _place(ids: NDArray[np.int32], part: NDArray[np.int32], position: int) -> int | None:
    """Index of the first place from `position` on at which `part` stands in `ids`."""
    size = ids.itemsize
    text, wanted = ids.tobytes(), part.astype(ids.dtype).tobytes()
    at = text.find(wanted, position * size)
    while at >= 0 and at % size:
        at = text.find(wanted, at + 1)
    return at // size if at >= 0 else None
