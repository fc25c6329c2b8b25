"""Documents with weights, as rows of their own and packed, and the plain definition of every loss of `train.loss`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from train_toys import VOCABULARY, ToyPrepared

from sft.train.collator import IGNORE

WEIGHTS = "loss_weights"
COUNT = 6
PACKS = ([0, 1, 2], [3, 4, 5])
LOSSES: list[dict[str, Any]] = [
    {"type": "nll"},
    {"type": "dft"},
    {"type": "power", "alpha": 2.0},
    {"type": "threshold", "threshold": 0.01},
    {"label_smoothing": 0.1, "z_loss": 1e-3},
    {"normalize": "sample"},
    {"weights": "weight"},
    {"type": "dft", "normalize": "sample", "weights": "weight", "label_smoothing": 0.05},
]


def documents(weighted: bool = False) -> list[dict[str, Any]]:
    """Six documents of unlike lengths; one supervises nothing, one weighs nothing."""
    rng = np.random.default_rng(5)
    made = []
    for number, length in enumerate((5, 21, 9, 3, 14, 30)):
        mask = (np.arange(length) >= length // 3) & (number != 3)
        weights = rng.uniform(0, 3, length) * (number != 2)
        row = {"input_ids": rng.integers(3, VOCABULARY, length).tolist(), "assistant_masks": mask.astype(int).tolist()}
        made.append({**row, "seq_lengths": [length], **({WEIGHTS: weights.tolist()} if weighted else {})})
    return made


def packed(rows: list[dict[str, Any]], packs: tuple[list[int], ...] = PACKS) -> list[dict[str, Any]]:
    """The same documents, several in a row."""
    return [{name: [value for n in pack for value in rows[n][name]] for name in rows[0]} for pack in packs]


def prepared(rows: list[dict[str, Any]]) -> ToyPrepared:
    """Rows as a stage's prepared data."""
    from datasets import Dataset, Features, List, Value

    kinds = {"input_ids": "int32", "assistant_masks": "uint8", "seq_lengths": "int32", WEIGHTS: "float64"}
    features = Features({name: List(Value(kinds[name])) for name in rows[0]})
    return ToyPrepared(Dataset.from_list(rows, features=features))


def of_target(p: Tensor, loss: dict[str, Any]) -> Tensor:
    """f(p) of a stage's loss."""
    kind = loss.get("type", "nll")
    if kind == "dft":
        return -p.detach() * p.log()
    if kind == "power":
        return (1 - p ** loss["alpha"]) / loss["alpha"]
    return -p.log() * (p >= loss["threshold"]) if kind == "threshold" else -p.log()


def plain_loss(model: Any, rows: list[dict[str, Any]], loss: dict[str, Any]) -> Tensor:
    """The loss of a step over all documents, from their logits one by one."""
    summed: Any = 0.0
    divisor = 0.0
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        labels = torch.where(torch.tensor(row["assistant_masks"]).bool(), ids, IGNORE)[1:]
        kept = labels != IGNORE
        if not kept.any():
            continue
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        log_probs = logits.log_softmax(-1)
        p = log_probs.gather(1, labels.clamp(min=0)[:, None])[:, 0].exp()
        smoothing = loss.get("label_smoothing", 0.0)
        losses = (1 - smoothing) * of_target(p, loss) - smoothing * log_probs.mean(-1)
        losses = losses + loss.get("z_loss", 0.0) * logits.logsumexp(-1).square()
        weights = torch.tensor(row[WEIGHTS], dtype=torch.float64)[1:] if WEIGHTS in row else torch.ones(len(labels))
        weights = torch.where(kept, weights.to(losses.dtype), 0.0)
        if loss.get("normalize") == "sample":
            weights = weights / kept.sum()
        summed, divisor = summed + (weights * losses).sum(), divisor + weights.sum()
    return summed / divisor
