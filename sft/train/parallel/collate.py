"""A rank's share of the row that a micro-batch is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sft.models.row_shares import TokenCosts, cant_share
from sft.train.collator import IGNORE, ROW_CUT, ROW_SUPERVISED, TEACHER_COLUMNS, TOKEN_KEYS, WEIGHTS, PackedCollator
from sft.train.parallel.balance import balanced_cuts
from sft.train.parallel.cut import RowCut
from sft.train.parallel.exchange import Ranks
from sft.utils.errors import UserError

OF_TOKENS = ("input_ids", "position_ids", "seq_idx", TOKEN_KEYS)


def shared_rows(collator: Any, model: Any, ranks: Ranks, stage: str) -> ShareCollator:
    """The collator of a rank that shares rows with others. Raises UserError where `model` or its rows can't be."""
    costs, where = TokenCosts.of(model), f"stages[{stage}].train.sequence_parallel_size"
    if costs is None:
        raise UserError(f"{where}: {cant_share(model)}.")
    if not isinstance(collator, PackedCollator):
        raise UserError(
            f"{where}: only packed rows can be shared, and this model is trained on padded ones: leave it out."
        )
    return ShareCollator(collator, costs, ranks.rank, ranks.size)


class ShareCollator:
    """What PackedCollator makes of the rows, and of that this rank's share.

    Every rank of a group makes the whole row and cuts it in the same places. Labels are shifted before the cut: a
    share's last token predicts the next one's first. So there are `shift_labels` in place of `labels`, and what is
    counted (`num_supervised`, `num_weighted`, `token_sources`) is of them; `row_cut` and `row_supervised` tell of the
    whole row.
    """

    def __init__(self, collator: PackedCollator, costs: TokenCosts, rank: int, size: int) -> None:
        self.collator, self.costs, self.rank, self.size = collator, costs, rank, size

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = self.collator(rows)
        borders = batch["cu_seq_lens_q"]
        targets = shifted(batch.pop("labels"))
        supervised = targets[0] != IGNORE
        cuts = balanced_cuts(borders.diff().long().numpy(), supervised.numpy(), self.costs, self.size)
        cut = RowCut(tuple(borders.tolist()), cuts)
        start, end = cut.share(self.rank)
        mine = supervised[start:end]
        own = torch.tensor(cut.borders_of(self.rank), dtype=torch.int32)
        for name in (WEIGHTS, *TEACHER_COLUMNS):
            if name in batch:
                batch[name] = batch[name].roll(-1, 1)[:, start:end]
        if "token_sources" in batch:
            before = int(supervised[:start].sum())
            batch["token_sources"] = batch["token_sources"][before : before + int(mine.sum())]
        weights = batch.get(WEIGHTS)
        return {
            **batch,
            **{name: batch[name][:, start:end] for name in OF_TOKENS if name in batch},
            "shift_labels": targets[:, start:end],
            "cu_seq_lens_q": own,
            "cu_seq_lens_k": own.clone(),
            # Of what the collator adds to a row without anything to predict nothing is counted.
            "num_tokens": max(0, min(end, batch["num_tokens"]) - start),
            "num_supervised": int(mine.sum()),
            "num_weighted": float(mine.sum() if weights is None else weights[0, mine].sum()),
            ROW_CUT: cut,
            ROW_SUPERVISED: batch["num_supervised"],
        }


def shifted(labels: Tensor) -> Tensor:
    """`(1, T)` labels, none on the first token of a document -> what each token has to predict."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
