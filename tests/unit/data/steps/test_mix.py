"""The step `mix`: shares of tokens, repeats, and independence of order and shards."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from step_toys import context, entry, record, run_table

from sft.data.read.record import Record
from sft.data.steps.base import verdict_schema
from sft.utils.errors import UserError


def _rows(sizes: dict[str, list[int]]) -> list[Record]:
    return [
        record(
            f"{source} {number}?",
            id=f"{source}{number}",
            source=source,
            place=f"{source}.jsonl:{number}",
            tokens=tokens,
        )
        for source, lengths in sizes.items()
        for number, tokens in enumerate(lengths)
    ]


def _copies(kept: list[tuple[Record, int]]) -> dict[str, int]:
    return {row.id: copies for row, copies in kept}


def _tokens(kept: list[tuple[Record, int]]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for row, copies in kept:
        counts[row.source] += copies * (row.tokens or 0)
    return counts


def test_shares_are_of_tokens_and_hold_to_the_token(tmp_path: Path) -> None:
    rows = _rows({"math": [1] * 1000, "code": [1] * 1000})
    kept, dropped = run_table("mix", rows, context(tmp_path), weights={"math": 3, "code": 1.0}, tokens=400)
    assert _tokens(kept) == {"math": 300, "code": 100}
    assert {drop.reason for drop in dropped} == {"over_budget"} and len(dropped) == 1600
    assert dropped[0].detail == "math: 300 of 1000 tokens are taken; this row has 1"
    written = pq.read_table(tmp_path / "verdicts.parquet")
    assert (written.schema.names, written.schema.types) == (verdict_schema().names, verdict_schema().types)


def test_whole_epochs_come_first_then_a_part(tmp_path: Path) -> None:
    rows = _rows({"small": [10] * 10, "large": [10] * 100})
    weights = {"small": 0.25, "large": 0.75}
    kept, _ = run_table("mix", rows, context(tmp_path), weights=weights, tokens=1000, max_repeats=3)
    copies = [copies for row, copies in kept if row.source == "small"]
    assert sorted(copies) == [2] * 5 + [3] * 5
    assert _tokens(kept) == {"small": 250, "large": 750}


@pytest.mark.parametrize(
    ("max_repeats", "total"),
    [(1, 400), (4, 1600), ({"small": 2}, 800), ({"small": 20}, 1000 * 4 // 3)],
)
def test_without_tokens_the_scarcest_source_decides(tmp_path: Path, max_repeats: Any, total: int) -> None:
    rows = _rows({"small": [1] * 100, "large": [1] * 1000})
    weights = {"small": 0.25, "large": 0.75}
    kept, _ = run_table("mix", rows, context(tmp_path), weights=weights, max_repeats=max_repeats)
    # The budget is whole tokens of each source, so a total that doesn't divide loses less than one of each.
    assert 0 <= total - sum(_tokens(kept).values()) <= 1


SIZES = st.dictionaries(
    st.sampled_from(["a", "b", "c"]), st.lists(st.integers(1, 60), min_size=1, max_size=25), min_size=1
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=SIZES, data=st.data())
def test_shares_are_within_one_row_whatever_the_rows(
    tmp_path_factory: pytest.TempPathFactory, sizes: dict[str, list[int]], data: st.DataObject
) -> None:
    weights = {name: data.draw(st.integers(1, 5)) / 4 for name in sizes}
    repeats, seed = data.draw(st.integers(1, 3)), data.draw(st.integers(0, 5))
    rows = _rows(sizes)
    most = min(sum(sizes[name]) * repeats * sum(weights.values()) / weights[name] for name in sizes)
    wanted = data.draw(st.one_of(st.none(), st.integers(1, max(1, int(most)))))
    arguments: dict[str, Any] = {"weights": weights, "tokens": wanted, "max_repeats": repeats}
    total = most if wanted is None else wanted

    kept, dropped = run_table("mix", rows, context(tmp_path_factory.mktemp("a"), seed=seed), **arguments)
    assert len(kept) + len(dropped) == len(rows)
    taken = _tokens(kept)
    for name, lengths in sizes.items():
        target = total * weights[name] / sum(weights.values())
        assert target - max(lengths) - 1 < taken[name] <= target + 1e-6
        counts = [copies for row, copies in kept if row.source == name]
        counts += [0] * (len(lengths) - len(counts))
        assert max(counts) - min(counts) <= 1 and max(counts) <= repeats

    shuffled = random.Random(seed).sample(_rows(sizes), len(rows))
    again, _ = run_table("mix", shuffled, context(tmp_path_factory.mktemp("b"), seed=seed), shards=3, **arguments)
    assert _copies(again) == _copies(kept)


def test_the_seed_decides_the_part(tmp_path: Path) -> None:
    rows = _rows({"a": [1] * 200})
    parts = [
        set(_copies(run_table("mix", rows, context(tmp_path / str(seed), seed=seed), weights={"a": 1}, tokens=100)[0]))
        for seed in (1, 2)
    ]
    assert all(len(part) == 100 for part in parts) and 25 < len(parts[0] & parts[1]) < 75


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"math": 1}}, "no weight for the source 'code'; the sources are: code, math"),
        ({"weights": {"math": 1, "code": 1, "chat": 2}}, "no row has the source 'chat'; there are: code, math"),
        (
            {"weights": {"math": 1, "code": 1}, "tokens": 500},
            "500 tokens need 250 of the source 'code', which has 50, and max_repeats allows 50; set tokens to 100",
        ),
    ],
)
def test_a_mix_that_cant_be_says_why(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    rows = _rows({"math": [1] * 100, "code": [1] * 50})
    with pytest.raises(UserError, match=message):
        run_table("mix", rows, context(tmp_path), **arguments)


def test_weight_zero_drops_a_source(tmp_path: Path) -> None:
    rows = _rows({"math": [1] * 10, "code": [1] * 10})
    kept, _ = run_table("mix", rows, context(tmp_path), weights={"math": 1, "code": 0, "gone": 0})
    assert _tokens(kept) == {"math": 10}


def test_problems_without_answers_have_no_tokens_to_mix(tmp_path: Path) -> None:
    rows = [*_rows({"math": [5]}), record(id="p", source="math", completion=None)]
    kept, dropped = run_table("mix", rows, context(tmp_path), weights={"math": 1})
    assert list(_copies(kept)) == ["math0"] and [drop.reason for drop in dropped] == ["no_conversation"]
    with pytest.raises(UserError, match="'math' have no answers"):
        run_table("mix", rows[1:], context(tmp_path / "2"), weights={"math": 1})


def test_no_rows_make_no_verdicts(tmp_path: Path) -> None:
    assert run_table("mix", [], context(tmp_path), weights={"math": 1}) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": {"a": -1.0}}, "positive"),
        ({"weights": {"a": 0}}, "all be 0"),
        ({"weights": {"a": float("nan")}}, "finite"),
        ({"weights": {"a": 1}, "max_repeats": {"b": 2}}, "no source named in weights"),
        ({"weights": {"a": 1}, "max_repeats": 0}, "1 or more"),
    ],
)
def test_settings_are_checked(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        entry("mix", **arguments)
