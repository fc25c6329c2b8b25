"""The step `filter`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from step_toys import context, entry, record, run_rows

from sft.data.read.outcomes import Dropped


@pytest.mark.parametrize(
    ("settings", "values", "reasons"),
    [
        ({"one_of": ["Yes"]}, ["yes ", "No", None, "YES"], [None, "filter_value", "filter_missing", None]),
        ({"one_of": [True]}, [True, "true", False, 1], [None, None, "filter_value", "filter_value"]),
        ({"one_of": [2]}, [2, 2.0, "2", 3], [None, None, None, "filter_value"]),
        ({"none_of": ["proof", "notfound"]}, ["Proof", "7", None], ["filter_value", None, "filter_missing"]),
        ({"min": 0.2, "max": 0.5}, [0.2, "0.5", 0.51, 0.1], [None, None, "filter_range", "filter_range"]),
        ({"max": 1, "missing": "keep"}, ["n/a", None, float("nan"), 2], [None, None, None, "filter_range"]),
        ({"max": 1}, ["n/a", True, [1], 1], ["filter_missing", "filter_missing", "filter_missing", None]),
    ],
)
def test_filter_by_a_carried_column(tmp_path: Path, settings: Any, values: Any, reasons: Any) -> None:
    rows = [record(id=str(n), carried={"c": value}) for n, value in enumerate(values)]
    outcomes = run_rows("filter", rows, context(tmp_path), column="c", **settings)
    assert [outcome.reason if isinstance(outcome, Dropped) else None for outcome in outcomes] == reasons


def test_filter_by_domain(tmp_path: Path) -> None:
    rows = [record(id="a", domain="Math"), record(id="b", domain="code"), record(id="c")]
    outcomes = run_rows("filter", rows, context(tmp_path), column="domain", one_of=["math"])
    assert [outcome.record.id for outcome in outcomes if isinstance(outcome, Dropped)] == ["b", "c"]


def test_a_filter_that_keeps_everything_is_refused() -> None:
    with pytest.raises(ValidationError, match="keeps everything"):
        entry("filter", column="c")
