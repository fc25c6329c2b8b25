"""Micro-batches from prepared rows: flattened into one packed row, or padded for models that can't be packed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

IGNORE = -100
"""The label of a token that no loss reads (Hugging Face's convention)."""

ROW_CUT = "row_cut"
"""Of a batch that is a share of a row: where the row is cut."""
ROW_SUPERVISED = "row_supervised"
"""Of such a batch: how many supervised tokens the whole row has."""

TOKEN_KEYS = "token_keys"
"""Of a batch whose dropout belongs to documents: a number for each token, which follows from its document."""

COUNT_KEYS: tuple[str, ...] = ("num_tokens", "num_supervised", "num_weighted", "token_sources")
COUNT_KEYS += (ROW_CUT, ROW_SUPERVISED, TOKEN_KEYS, "skipped")
"""What rides along with a batch for the trainer (which adds `skipped`); never passed to the model."""
SOURCES = "document_sources"
"""The column with the name of each document's source."""
WEIGHTS = "loss_weights"
"""The column with the weight of each token's loss, and the batch's tensor."""

Normalize = Literal["token", "sample"]
"""What counts once in the loss of a step: each supervised token, or each document that has any."""


TEACHER_COLUMNS = ("teacher_ids", "teacher_logprobs")
"""Of rows with a teacher to learn from: (trained tokens, k) each (see `sft.data.read.record.TopLogprobs`)."""


class PackedCollator:
    """Flatten every document of every row into one packed row, and say where the documents end.

    A row is a mapping with `input_ids`, `assistant_masks` (1: trained) and `seq_lengths` (documents in this row; their
    sum is `len(input_ids)`). Rows without a token are allowed: they fill up an epoch's steps and count for nothing.

    Returns a dict: `input_ids`, `labels`, `position_ids` int64 (1, T), `seq_idx` int32 (1, T), `cu_seq_lens_q/k` int32
    (S+1,), `max_length_q/k` int, and COUNT_KEYS. `labels` are not shifted; they are -100 where nothing is trained and
    on each document's first token, which no token of its own document predicts. Where rows have WEIGHTS or documents
    are what counts, also `loss_weights` float64 (1, T), as `label_weights` makes them.

    Where rows have TEACHER_COLUMNS, also `teacher_ids` int32 (1, T, k), -1 where the teacher says nothing, and
    `teacher_logprobs` float32 (1, T, k), since autocast on a CPU refuses the float16 they are stored in: position t
    speaks of label t. With `sources`, names of the rows' SOURCES, `token_sources` is each supervised token's source, by
    its number, int64 (num_supervised,). With `keys` TOKEN_KEYS int64 (1, T), as `token_keys` makes them.
    """

    def __init__(
        self, pad_token_id: int = 0, normalize: Normalize = "token", sources: Sequence[str] = (), keys: bool = False
    ) -> None:
        self.pad_token_id, self.normalize, self.sources, self.keys = pad_token_id, normalize, sources, keys

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, masks, lengths = _concatenate(rows)
        given = _weights(rows, len(ids))
        num_tokens = len(ids)
        if not (lengths >= 2).any():
            # A row that holds nothing to predict still has to run: every process takes part in every step.
            ids = np.concatenate([ids, np.full(2, self.pad_token_id, dtype=np.int64)])
            masks = np.concatenate([masks, np.zeros(2, dtype=bool)])
            lengths = np.concatenate([lengths, np.array([2], dtype=np.int64)])
            given = None if given is None else np.concatenate([given, np.zeros(2)])
        ends = np.concatenate([[0], np.cumsum(lengths)])
        starts = np.repeat(ends[:-1], lengths)
        labels = np.where(masks, ids, IGNORE)
        labels[ends[:-1]] = IGNORE
        boundaries = torch.from_numpy(ends.astype(np.int32))
        longest = int(lengths.max())
        weights, total = label_weights(labels != IGNORE, lengths, given, self.normalize)
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
            "num_weighted": total,
            **({} if weights is None else {WEIGHTS: torch.from_numpy(weights)[None]}),
            **({TOKEN_KEYS: torch.from_numpy(token_keys(ids, lengths))[None]} if self.keys else {}),
            **{name: values[None] for name, values in _teacher(rows, masks, labels).items()},
            **_sources(rows, self.sources, labels[:num_tokens] != IGNORE),
        }


class PaddedCollator:
    """One document a row, padded on the right, for models that let packed documents see each other.

    Returns `input_ids`, `attention_mask`, `labels` int64 (documents, longest), COUNT_KEYS, and WEIGHTS as a packed
    batch has them; where rows have TEACHER_COLUMNS also `teacher_ids` and `teacher_logprobs` (documents, longest, k);
    with `sources`, `token_sources` as a packed batch has them; with `keys` TOKEN_KEYS (documents, longest).
    """

    def __init__(
        self, pad_token_id: int = 0, normalize: Normalize = "token", sources: Sequence[str] = (), keys: bool = False
    ) -> None:
        self.pad_token_id, self.normalize, self.sources, self.keys = pad_token_id, normalize, sources, keys

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids, masks, lengths = _concatenate(rows)
        given = _weights(rows, len(ids))
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
        teacher = _teacher(rows, masks, labels[inside] if len(ids) else labels[:0, 0])
        supervised = labels[inside][: len(ids)] != IGNORE
        weights, total = label_weights(supervised, lengths, given, self.normalize)
        spread: dict[str, Any] = {name: _padded(values, inside) for name, values in teacher.items()}
        if self.keys:
            keys = np.zeros(shape, dtype=np.int64)
            if len(ids):
                keys[inside] = token_keys(ids, lengths)
            spread[TOKEN_KEYS] = torch.from_numpy(keys)
        if weights is not None:
            spread[WEIGHTS] = torch.zeros(shape, dtype=torch.float64)
            spread[WEIGHTS][torch.from_numpy(inside)] = torch.from_numpy(np.resize(weights, int(inside.sum())))
        return {
            "input_ids": torch.from_numpy(input_ids),
            "attention_mask": torch.from_numpy(inside.astype(np.int64)),
            "labels": torch.from_numpy(labels),
            "num_tokens": len(ids),
            "num_supervised": int((labels != IGNORE).sum()),
            "num_weighted": total,
            **spread,
            **_sources(rows, self.sources, supervised),
        }


def _teacher(rows: Sequence[Mapping[str, Any]], masks: np.ndarray, labels: np.ndarray) -> dict[str, torch.Tensor]:
    """What teachers say at each token (T, k) of rows that are end to end; nothing where no row has one.

    `masks` (T,) as far as the rows go, `labels` (T,), which may be fewer: nothing is said of a token without a label.
    """
    given = [row for row in rows if "teacher_ids" in row and len(row["teacher_ids"])]
    if not given:
        return {}
    trained = np.flatnonzero(masks)
    if len(given) < sum(bool(np.any(row["assistant_masks"])) for row in rows):
        raise ValueError("some rows of the batch have no teacher_ids, and others have")
    found = {}
    for name, kind, nothing in zip(TEACHER_COLUMNS, (np.int32, np.float32), (-1, 0), strict=True):
        said = np.concatenate([np.asarray(row[name], dtype=kind) for row in given])
        if said.ndim != 2 or len(said) != len(trained):
            raise ValueError(f"{name} is {said.shape} for {len(trained)} trained tokens; expected (trained tokens, k)")
        values = np.full((len(labels), said.shape[1]), nothing, dtype=kind)
        values[trained] = said
        values[labels == IGNORE] = nothing
        found[name] = torch.from_numpy(values)
    return found


def _padded(values: torch.Tensor, inside: np.ndarray) -> torch.Tensor:
    """(T, k) to (documents, longest, k); beyond a document's end its teacher says nothing."""
    padded = values.new_full((*inside.shape, values.shape[1]), -1 if values.dtype == torch.int32 else 0)
    padded[torch.from_numpy(inside)] = values
    return padded


def _sources(
    rows: Sequence[Mapping[str, Any]], sources: Sequence[str], supervised: NDArray[np.bool_]
) -> dict[str, torch.Tensor]:
    """`token_sources` of a batch whose tokens, end to end, are `supervised` (T,) or not; nothing without `sources`."""
    if not sources or not all(SOURCES in row for row in rows):
        return {}
    numbers = {name: number for number, name in enumerate(sources)}
    of_documents = np.array([numbers[str(name)] for row in rows for name in row[SOURCES]], dtype=np.int64)
    lengths = np.concatenate([np.asarray(row["seq_lengths"], dtype=np.int64) for row in rows])
    return {"token_sources": torch.from_numpy(np.repeat(of_documents, lengths)[supervised])}


def token_keys(ids: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """(T,): numbers as good as random that follow from each token's document (S of `lengths`) and its place in it."""
    ends = np.cumsum(lengths)
    documents = [
        int.from_bytes(hashlib.blake2b(ids[end - length : end].tobytes(), digest_size=8).digest(), "little")
        for end, length in zip(ends, lengths, strict=True)
    ]
    places = np.arange(len(ids)) - np.repeat(ends - lengths, lengths)
    of_documents = np.repeat(np.array(documents, dtype=np.uint64), lengths)
    return (of_documents + places.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)).view(np.int64)


def label_weights(
    supervised: NDArray[np.bool_],
    lengths: NDArray[np.int64],
    given: NDArray[np.float64] | None,
    normalize: Normalize,
) -> tuple[NDArray[np.float64] | None, float]:
    """What each label's loss is multiplied by, (T,), None for 1; and the sum of it all, which a mean divides by.

    A token's weight is that of its data (1 without), and where documents count, divided by the supervised tokens of its
    document. Then the mean is over documents, each weighing as much as its tokens do on average; without weights each
    weighs 1, and the sum is the number of documents that have a supervised token. Dividing by the sum of the weights,
    as torch's cross entropy and Megatron do with class weights and loss masks, leaves a loss that doesn't depend on the
    weights' scale; a step is as large whatever their mean.
    """
    if given is None and normalize == "token":
        return None, float(supervised.sum())
    weights = np.where(supervised, 1.0 if given is None else given, 0.0)
    if normalize == "token":
        return weights, float(weights.sum())
    document = np.repeat(np.arange(len(lengths)), lengths)
    counts = np.bincount(document, supervised, minlength=len(lengths))
    sums = np.bincount(document, weights, minlength=len(lengths))
    total = float((sums[counts > 0] / counts[counts > 0]).sum())
    return weights / np.maximum(counts, 1)[document], total


def _weights(rows: Sequence[Mapping[str, Any]], tokens: int) -> NDArray[np.float64] | None:
    """The weights (T,) of all tokens of `rows`, end to end; None where no row has any."""
    if not any(WEIGHTS in row for row in rows):
        return None
    weights = np.concatenate([np.asarray(row[WEIGHTS], dtype=np.float64) for row in rows])
    if len(weights) != tokens:
        raise ValueError(f"the batch has {len(weights)} {WEIGHTS} for {tokens} input_ids")
    return weights


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
