"""Weights of a stage's loss: from a number of a row, or one for each message or token, to those of its tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sft.data.look.find import put_aside
from sft.data.prepare import PreparedStage
from sft.utils.errors import UserError

Prepare = Callable[..., PreparedStage]
Write = Callable[..., Path]
TRAIN = {"loss": {"weights": "weight"}}
TALK = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "bc"},
    {"role": "user", "content": "d"},
    {"role": "assistant", "content": "efg"},
]


def weights_of(prepared: PreparedStage, at: int = 0) -> list[float]:
    """The weights of a row's trained tokens."""
    row = prepared.dataset[at]
    assert len(row["loss_weights"]) == len(row["input_ids"])
    return [w for w, trained in zip(row["loss_weights"], row["assistant_masks"], strict=True) if trained]


def test_a_number_is_for_all_tokens_of_its_row(prepare: Prepare, write_rows: Write) -> None:
    rows = [{"prompt": "p", "completion": "x" * (n + 1), "weight": n / 2} for n in range(4)]
    prepared = prepare(write_rows(rows), train=TRAIN)
    assert [set(weights_of(prepared, at)) for at in range(4)] == [{0.0}, {0.5}, {1.0}, {1.5}]
    plain = prepare(write_rows(rows))
    assert "loss_weights" not in plain.dataset.column_names and plain.manifest["key"] != prepared.manifest["key"]
    assert plain.dataset["input_ids"][:] == prepared.dataset["input_ids"][:]


@pytest.mark.parametrize("weights", [[1, 2, 3, 0.25], [None, 2, None, 0.25]], ids=str)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_list_is_for_the_messages(prepare: Prepare, write_rows: Write, weights: Any, system: str | None) -> None:
    path = write_rows([{"messages": TALK, "weight": weights}])
    prepared = prepare(path, train=TRAIN, system_prompt=system)
    # "bc" and its end; "efg", its end and the end of the text: one token a byte.
    assert weights_of(prepared) == [2.0] * 3 + [0.25] * 5


def test_a_list_is_for_the_tokens(prepare: Prepare, write_rows: Write) -> None:
    row = {"messages": TALK}
    tokens = len(prepare(write_rows([row])).dataset[0]["input_ids"])
    weights = np.linspace(0, 2, tokens).tolist()
    path = write_rows([{**row, "weight": weights}])
    assert prepare(path, train=TRAIN).dataset[0]["loss_weights"] == weights
    cut = prepare(path, train={**TRAIN, "max_length": tokens - 3}, over_length="truncate")
    assert cut.dataset[0]["loss_weights"] == weights[:-3]


def test_packed_rows_hold_the_weights_of_each_document(prepare: Prepare, write_rows: Write) -> None:
    rows = [{"prompt": "p", "completion": "x" * (1 + n % 7), "weight": float(n)} for n in range(30)]
    path = write_rows(rows)
    prepared = prepare(path, train={**TRAIN, "packing": True, "max_length": 64})
    assert len(prepared.dataset) < 30
    for row in prepared.dataset:
        numbers = [float(int(name.rpartition(":")[2]) - 1) for name in row["document_ids"]]
        assert row["loss_weights"] == np.repeat(numbers, row["seq_lengths"]).tolist()


BAD: list[Any] = [
    -1,
    "much",
    float("nan"),
    True,
    None,
    {"a": 1},
    [1.0, -2.0],
    [1.0],
    [1.0, None, 1.0, None],
    [1.0] * 200,
]


def test_weights_that_cannot_be_used_are_bad_rows(prepare: Prepare, write_rows: Write) -> None:
    rows = [{"messages": TALK, "weight": bad} for bad in BAD] + [{"messages": TALK, "weight": 1}]
    prepared = prepare(write_rows(rows), train=TRAIN, max_bad_fraction=1.0)
    aside = put_aside(prepared)
    assert [row["reason"] for row in aside] == ["weights"] * len(BAD) and len(prepared.dataset) == 1
    assert all("'weight'" in row["detail"] for row in aside)
    with pytest.raises(UserError, match=rf"{len(BAD)} of {len(rows)} rows are bad \(weights: {len(BAD)}\)"):
        prepare(write_rows(rows), train=TRAIN)


def test_text_of_csv_is_a_number(prepare: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion,weight\np,x,0.5\np,y,"[0, 2]"\n')
    prepared = prepare(path, train=TRAIN)
    assert [set(weights_of(prepared, at)) for at in (0, 1)] == [{0.5}, {2.0}]


def test_a_column_that_is_not_there_is_told(prepare: Prepare, write_rows: Write) -> None:
    with pytest.raises(UserError, match=r"`train.loss.weights` names a column 'weight' that isn't there; it has: comp"):
        prepare(write_rows([{"prompt": "p", "completion": "x"}]), train=TRAIN)
