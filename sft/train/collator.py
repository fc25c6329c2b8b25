"""Micro-batches from prepared rows: flattened into one packed row, or padded for models that can't be packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

IGNORE = -100
"""The label of a token that no loss reads (Hugging Face's convention)."""

COUNT_KEYS = ("num_tokens", "num_supervised", "token_sources", "skipped")
"""What rides along with a batch for the trainer (which adds the last); never passed to the model."""


class PackedCollator:
    """Flatten every document of every row into one packed row, and say where the documents end.

    A row is a mapping with `input_ids`, `assistant_masks` (1: trained) and `seq_lengths` (documents in this row; their
    sum is `len(input_ids)`). Rows without a token are allowed: they fill up an epoch's steps and count for nothing.

    Returns a dict: `input_ids`, `labels`, `position_ids` int64 (1, T), `seq_idx` int32 (1, T), `cu_seq_lens_q/k` int32
    (S+1,), `max_length_q/k` int, and COUNT_KEYS. `labels` are not shifted; they are -100 where nothing is trained and
    on each document's first token, which no token of its own document predicts. With `sources`, names of the rows'
    `document_sources`, `token_sources` is each supervised token's source, by its number, int64 (num_supervised,).
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id
        self.sources: Sequence[str] = ()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, masks, lengths = _concatenate(rows)
        num_tokens = len(ids)
        if not (lengths >= 2).any():
            # A row that holds nothing to predict still has to run: every process takes part in every step.
            ids = np.concatenate([ids, np.full(2, self.pad_token_id, dtype=np.int64)])
            masks = np.concatenate([masks, np.zeros(2, dtype=bool)])
            lengths = np.concatenate([lengths, np.array([2], dtype=np.int64)])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(ends[:-1], lengths)
        labels = np.where(masks, ids, IGNORE)
        labels[ends[:-1]] = IGNORE
        boundaries = torch.from_numpy(ends.astype(np.int32))
        longest = int(lengths.max())
        return {
            "input_ids": torch.from_numpy(ids)[None],
            "labels": torch.from_numpy(labels)[None],
            "position_ids": torch.from_numpy(np.arange(len(ids)) - starts)[None],
            "seq_idx": torch.from_numpy(np.repeat(np.arange(len(lengths), dtype=np.int32), lengths))[None],
            "cu_seq_lens_q": boundaries,
            "cu_seq_lens_k": boundaries.clone(),
            "max_length_q": longest,
            "max_length_k": longest,
            "num_tokens": num_tokens,
            "num_supervised": int((labels != IGNORE).sum()),
            **token_sources(rows, self.sources, labels[:num_tokens] != IGNORE),
        }


class PaddedCollator:
    """One document a row, padded on the right, for models that let packed documents see each other.

    Returns `input_ids`, `attention_mask`, `labels` int64 (documents, longest) and COUNT_KEYS, as PackedCollator.
    """

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id
        self.sources: Sequence[str] = ()

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, masks, lengths = _concatenate(rows)
        lengths = lengths[lengths > 0]
        longest = max(2, int(lengths.max(initial=0)))
        shape = (max(1, len(lengths)), longest)
        inside = np.arange(longest) < (lengths[:, None] if len(lengths) else np.array([[2]]))
        input_ids = np.full(shape, self.pad_token_id, dtype=np.int64)
        labels = np.full(shape, IGNORE, dtype=np.int64)
        if len(ids):
            input_ids[inside] = ids
            labels[inside] = np.where(masks, ids, IGNORE)
            labels[:, 0] = IGNORE
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "num_tokens": len(ids),
            "num_supervised": int((labels != IGNORE).sum()),
            **token_sources(rows, self.sources, labels[inside][: len(ids)] != IGNORE),
        }


def token_sources(
    rows: Sequence[Mapping[str, Any]], sources: Sequence[str], supervised: np.ndarray
) -> dict[str, torch.Tensor]:
    """`token_sources` of a batch whose tokens, end to end, are `supervised` (T,) or not; nothing without `sources`."""
    if not sources or not all("document_sources" in row for row in rows):
        return {}
    numbers = {name: number for number, name in enumerate(sources)}
    of_documents = np.array([numbers[str(name)] for row in rows for name in row["document_sources"]], dtype=np.int64)
    lengths = np.concatenate([np.asarray(row["seq_lengths"], dtype=np.int64) for row in rows])
    return {"token_sources": torch.from_numpy(np.repeat(of_documents, lengths)[supervised])}


def _concatenate(rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids int64 (T,), trained-on mask bool (T,) and document lengths int64 (S,) of `rows`, end to end."""
    ids = [np.asarray(row["input_ids"], dtype=np.int64) for row in rows]
    masks = [np.asarray(row["assistant_masks"], dtype=bool) for row in rows]
    lengths = [np.asarray(row["seq_lengths"], dtype=np.int64) for row in rows]
    for index, (tokens, mask, parts) in enumerate(zip(ids, masks, lengths, strict=True)):
        if len(tokens) != len(mask) or len(tokens) != parts.sum():
            raise ValueError(
                f"row {index} of the batch has {len(tokens)} input_ids, {len(mask)} assistant_masks and seq_lengths "
                f"summing to {parts.sum()}; all three must agree"
            )
    return np.concatenate(ids), np.concatenate(masks), np.concatenate(lengths)
