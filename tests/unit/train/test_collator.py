"""Micro-batches: documents end to end, their boundaries, and which tokens are trained on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sft.train.collator import IGNORE, PackedCollator, PaddedCollator

ROWS = [
    {"input_ids": [5, 6, 7, 8, 9], "assistant_masks": [1, 1, 0, 0, 1], "seq_lengths": [2, 3]},
    {"input_ids": [4], "assistant_masks": [1], "seq_lengths": [1]},
]


def test_packed_batch_flattens_all_documents_of_all_rows():
    batch = PackedCollator()(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 4]]
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 2, 5, 6]
    assert batch["cu_seq_lens_q"].dtype == torch.int32 and batch["seq_idx"].dtype == torch.int32
    assert batch["position_ids"].tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch["seq_idx"].tolist() == [[0, 0, 1, 1, 1, 2]]
    assert (batch["max_length_q"], batch["max_length_k"]) == (3, 3)


def test_labels_leave_out_prompts_and_first_tokens():
    batch = PackedCollator()(ROWS)
    # 5 and 4 are marked as trained, but nothing of their own document predicts them.
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE, IGNORE, 9, IGNORE]]
    assert (batch["num_tokens"], batch["num_supervised"]) == (6, 2)


def test_empty_rows_count_for_nothing():
    empty = {"input_ids": [], "assistant_masks": [], "seq_lengths": []}
    with_empty, without = PackedCollator()([*ROWS, empty]), PackedCollator()(ROWS)
    for key, value in without.items():
        assert torch.equal(with_empty[key], value) if torch.is_tensor(value) else with_empty[key] == value


@pytest.mark.parametrize("collator", [PackedCollator(3), PaddedCollator(3)])
def test_batch_of_empty_rows_still_runs(collator):
    batch = collator([{"input_ids": [], "assistant_masks": [], "seq_lengths": []}])
    assert batch["input_ids"].tolist() == [[3, 3]]
    assert (batch["labels"] == IGNORE).all()
    assert (batch["num_tokens"], batch["num_supervised"]) == (0, 0)


def test_padded_batch_has_one_document_a_row():
    batch = PaddedCollator(0)(ROWS)
    assert batch["input_ids"].tolist() == [[5, 6, 0], [7, 8, 9], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORE, 6, IGNORE], [IGNORE, IGNORE, 9], [IGNORE] * 3]
    assert (batch["num_tokens"], batch["num_supervised"]) == (6, 2)


def test_packed_and_padded_supervise_the_same_tokens():
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(5):
        lengths = rng.integers(1, 9, size=3)
        total = int(lengths.sum())
        rows.append(
            {
                "input_ids": rng.integers(3, 90, total),
                "assistant_masks": rng.integers(0, 2, total),
                "seq_lengths": lengths,
            }
        )
    packed, padded = PackedCollator()(rows), PaddedCollator()(rows)
    assert packed["num_supervised"] == padded["num_supervised"] > 0
    kept = [batch["labels"][batch["labels"] != IGNORE].tolist() for batch in (packed, padded)]
    assert kept[0] == kept[1]


def test_rows_that_disagree_with_themselves_are_refused():
    with pytest.raises(
        ValueError, match="row 0 of the batch has 3 input_ids, 3 assistant_masks and seq_lengths summing"
    ):
        PackedCollator()([{"input_ids": [1, 2, 3], "assistant_masks": [1, 1, 1], "seq_lengths": [2]}])
