"""The last step: what may be trained on is no longer than a row, and has something to learn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_toys import context, record

from sft.data.pack.tokens import TokensWriter
from sft.data.read.outcomes import Dropped, Kept
from sft.data.read.record import Record, Tokens
from sft.data.steps.fit import Fit, FitSettings
from sft.utils.errors import UserError

MASK = [0, 0, 0, 1, 1, 1]


def fitted(folder: Path, max_length: int | None, over_length: Any, *, stored: bool) -> Kept | Dropped:
    """What becomes of a row of six tokens; its tokens in a file, or still in memory."""
    (folder / "pass").mkdir(exist_ok=True)
    tokens = Tokens(np.arange(6, dtype=np.int32), np.array(MASK, dtype=np.uint8))
    writer = TokensWriter(folder / "pass" / "tokens.arrow")
    row = record(tokens=6, trained=3, tokens_at=writer.add(tokens), encoded=None if stored else tokens)
    writer.finish()
    step = Fit(FitSettings(max_length, over_length), context(folder))
    step.passes = folder
    (outcome,) = step([row])
    assert isinstance(outcome, Kept | Dropped)
    return outcome


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("limit", [6, None])
def test_what_is_short_enough_goes_on_whole(tmp_path: Path, limit: int | None, stored: bool) -> None:
    outcome = fitted(tmp_path, limit, "drop", stored=stored)
    assert isinstance(outcome, Kept) and outcome.cut is None
    assert (outcome.record.tokens, outcome.record.trained) == (6, 3)


@pytest.mark.parametrize("stored", [True, False])
def test_what_is_cut_trains_what_is_left_of_it(tmp_path: Path, stored: bool) -> None:
    outcome = fitted(tmp_path, 4, "truncate", stored=stored)
    assert isinstance(outcome, Kept) and outcome.cut == "6 tokens"
    assert (outcome.record.tokens, outcome.record.trained) == (4, 1)


@pytest.mark.parametrize(
    ("limit", "policy", "reason"), [(5, "drop", "over_length"), (3, "truncate", "no_supervised_token")]
)
def test_what_has_nothing_to_learn_is_dropped(tmp_path: Path, limit: int, policy: str, reason: str) -> None:
    outcome = fitted(tmp_path, limit, policy, stored=True)
    assert isinstance(outcome, Dropped) and outcome.reason == reason


def test_an_error_names_the_row(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^toy.jsonl:\S+: 6 tokens are more than train.max_length 5; raise it, or set"):
        fitted(tmp_path, 5, "error", stored=True)


def test_a_problem_without_an_answer_is_dropped(tmp_path: Path) -> None:
    step = Fit(FitSettings(9, "drop"), context(tmp_path))
    (outcome,) = step([Record("a", "s", "p")])
    assert isinstance(outcome, Dropped) and outcome.reason == "no_conversation"
