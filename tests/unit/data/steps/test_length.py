"""The step `length`."""

from __future__ import annotations

from pathlib import Path

import pytest
from step_toys import context, record, run_rows

from sft.data.read.outcomes import Dropped, Kept


@pytest.mark.parametrize(("of", "kept"), [("all", [5, 6]), ("trained", [6])])
def test_length_keeps_what_lies_between_the_limits(tmp_path: Path, of: str, kept: list[int]) -> None:
    rows = [record(id=f"{n}", tokens=n, trained=n - 3) for n in (4, 5, 6, 20)]
    settings = {"min_tokens": 5 if of == "all" else 3, "max_tokens": 16, "of": of}
    outcomes = run_rows("length", rows, context(tmp_path), **settings)
    assert [outcome.record.tokens for outcome in outcomes if isinstance(outcome, Kept)] == kept
    reasons = {outcome.record.tokens: outcome.reason for outcome in outcomes if isinstance(outcome, Dropped)}
    assert reasons[4] == "too_short" and reasons[20] == "too_long"


def test_a_problem_without_answer_has_no_length(tmp_path: Path) -> None:
    (outcome,) = run_rows("length", [record(completion=None)], context(tmp_path), max_tokens=5)
    assert isinstance(outcome, Dropped) and outcome.reason == "no_conversation"
