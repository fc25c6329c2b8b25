"""A teacher's tokens laid over a document's: position by position, or the first that isn't there."""

from __future__ import annotations

import numpy as np
import pytest

from sft.data.read.record import TeacherTokens, Tokens, TopLogprobs
from sft.data.tokenize.teacher import aligned

DOCUMENT = [1, 2, 3, 10, 11, 12, 13, 14, 15, 9]  # a prompt, an answer, and what ends it
MASK = [0, 0, 0, 1, 1, 1, 1, 1, 1, 1]


def said(tokens: list[int]) -> TeacherTokens:
    """A teacher whose alternatives at its token n are n * 10 and n * 10 + 1."""
    places = np.arange(len(tokens))[:, None]
    ids = (places * 10 + np.arange(2)).astype(np.int32)
    return TeacherTokens(np.array(tokens, np.int32), TopLogprobs(ids, (-1.0 - ids).astype(np.float16)))


def spoken(tokens: list[int], document: list[int] = DOCUMENT, mask: list[int] = MASK) -> list[int] | int:
    """At each supervised token the number of the teacher's, -1 where there is none; or what doesn't match."""
    found = aligned(Tokens(np.array(document, np.int32), np.array(mask, np.uint8)), said(tokens))
    if isinstance(found, int):
        return found
    assert found.ids.dtype == np.int32 and found.logprobs.dtype == np.float16
    places = found.ids[:, 0] // 10
    for ids, logprobs, place in zip(found.ids, found.logprobs, places, strict=True):
        assert ids.tolist() == ([-1, -1] if place < 0 else [place * 10, place * 10 + 1])
        assert logprobs.tolist() == ([0, 0] if place < 0 else (-1.0 - ids).tolist())
    return places.tolist()


@pytest.mark.parametrize(
    ("tokens", "places"),
    [
        ([10, 11, 12, 13, 14, 15], [0, 1, 2, 3, 4, 5, -1]),
        ([10, 11, 12, 13, 14, 15, 9], [0, 1, 2, 3, 4, 5, 6]),  # it ends its turn as we do
        ([10, 11, 12, 13, 14, 15, -1], [0, 1, 2, 3, 4, 5, -1]),  # or otherwise
        ([12, 13, 14], [-1, -1, 0, 1, 2, -1, -1]),  # a data set has put something around it
        ([10, 11, -1, -1, 13, 14, 15], [0, 1, -1, 4, 5, 6, -1]),  # in two pieces
        ([70, 11, 12, 13, 14, 71], [-1, 1, 2, 3, 4, -1, -1]),  # joined with what stands around it
        ([10, 11, 99, -1, 98, 13, 14, 15], [0, 1, -1, 5, 6, 7, -1]),
    ],
)
def test_each_supervised_token_gets_what_the_teacher_says_of_it(tokens: list[int], places: list[int]) -> None:
    assert spoken(tokens) == places


@pytest.mark.parametrize(
    ("tokens", "first"),
    [
        ([10, 11, 77, 13, 14, 15], 2),
        ([10, 11, 12, 14, 15, 9], 3),
        ([70, 71, 72, 73], 0),
        ([10, 11, -1, 13, 88, 15, 9], 4),
        ([13, 14, 15, -1, 10, 11, 12], 4),  # the pieces stand the other way round
    ],
)
def test_the_first_token_that_is_not_there_is_told(tokens: list[int], first: int) -> None:
    assert spoken(tokens) == first


def test_the_last_answer_alone_is_looked_at() -> None:
    document, mask = [1, 10, 11, 9, 2, 10, 11, 9], [0, 1, 1, 1, 0, 1, 1, 1]
    assert spoken([10, 11, 9], document, mask) == [-1, -1, -1, 0, 1, 2]


def test_a_short_stretch_far_off_is_taken_for_chance() -> None:
    document = [1, *range(50, 80), 10, 11]
    mask = [0, *[1] * 32]
    assert isinstance(spoken([10, 11], document, mask), int)
    assert spoken(list(range(61, 80)), document, mask) == [-1] * 11 + list(range(19)) + [-1, -1]


def test_of_a_text_that_was_not_read_to_its_end_the_rest_may_go_on() -> None:
    document = Tokens(np.arange(40, dtype=np.int32), (np.arange(40) > 2).astype(np.uint8))
    teacher = said(list(range(3, 60)))
    found = aligned(document, teacher, whole=False)
    assert isinstance(found, TopLogprobs) and (found.ids[:, 0] == np.arange(37) * 10).all()
    assert aligned(document, teacher) == 37
    assert aligned(document, said([3, 4, 5, 99, 7]), whole=False) == 3


def test_the_byte_order_of_ids_makes_no_match() -> None:
    """Ids that look the same one byte further on."""
    assert spoken([256, 512, 256], [1, 1 << 16, 2 << 16, 1 << 16, 9], [0, 1, 1, 1, 1]) == 0
