"""The plan of segments against a plain loop over documents."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sambay_kernels.runtime.segments import LONGEST, SHORTEST, Plans, segment_length, segments


@settings(max_examples=200, deadline=None)
@given(lengths=st.lists(st.integers(0, 40), max_size=8), piece=st.sampled_from([1, 3, 8, 16]))
def test_segments_cut_every_document_and_nothing_else(lengths: list[int], piece: int) -> None:
    borders = torch.tensor([0, *lengths]).cumsum(0).int()
    plan = segments(borders, sum(lengths), piece, torch.device("cpu"))
    want, first = [], [0]
    for document, length in enumerate(lengths):
        start = int(borders[document])
        cuts = [*range(start, start + length, piece)] or [start]
        want += [(cut, min(cut + piece, start + length), document) for cut in cuts]
        first.append(len(want))
    found = list(zip(plan.start.tolist(), plan.end.tolist(), plan.document.tolist(), strict=True))
    assert len(found) == sum(lengths) // piece + len(lengths)
    assert found[: len(want)] == want and all(entry == (0, 0, -1) for entry in found[len(want) :])
    assert plan.first.tolist() == first and plan.borders.tolist() == borders.tolist()
    assert all(tensor.dtype == torch.int32 for tensor in plan)


def test_without_borders_the_row_is_one_document() -> None:
    plan = segments(None, 10, 4, torch.device("cpu"))
    assert plan.start.tolist() == [0, 4, 8] and plan.end.tolist() == [4, 8, 10] and plan.borders.tolist() == [0, 10]


def test_segments_are_as_long_as_keeps_a_gpu_busy() -> None:
    assert segment_length(2**20, 5120, 32) == LONGEST
    assert segment_length(32768, 5120, 32) == 512
    assert segment_length(100, 64, 32) == SHORTEST


def test_a_plan_is_kept_until_its_borders_change() -> None:
    plans, borders = Plans(), torch.tensor([0, 3, 10], dtype=torch.int32)
    plan = plans.find(borders, 10, 4)
    assert plans.find(borders, 10, 4) is plan and plans.find(borders.view(-1), 10, 4) is plan
    assert plans.find(borders, 10, 2) is not plan and plans.find(borders[:2], 3, 4) is not plan
    borders[1] = 5
    assert plans.find(borders, 10, 4).end.tolist() == [4, 5, 9, 10]
    assert plans.find(torch.tensor([0, 5, 10], dtype=torch.int32), 10, 4).end.tolist() == [4, 5, 9, 10]


def test_only_the_last_plans_are_kept_and_memory_is_not_taken_for_another() -> None:
    plans = Plans()
    for first in range(3 * Plans.MOST):  # freed at once, so that the same memory would come back
        plan = plans.find(torch.tensor([0, first, 100], dtype=torch.int32), 100, 100)
        assert plan.end.tolist()[:2] == [first, 100]
    assert len(plans._kept) == Plans.MOST
