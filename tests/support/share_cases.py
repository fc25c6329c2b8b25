"""A row that ranks share against the whole row on one process, in float64: `share_cases.main(FOLDER)` on four ranks.

Four ranks, and two pairs of them. Every rank makes the same random layouts; what it says of each is written as JSON.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from tiny_sambay import tiny_model
from torch import Tensor, distributed

from sft.models.row_shares import TokenCosts
from sft.train.collator import PackedCollator
from sft.train.parallel.collate import ShareCollator
from sft.train.parallel.cut import RowCut
from sft.train.parallel.exchange import Exchange, Ranks
from sft.train.parallel.probe import sharing_probe
from sft.train.parallel.share import RowShare
from sft.train.probe import TrainedPath
from sft.utils.errors import UserError

LAYOUTS, WINDOW = 50, 16
NAIVE = ("conv_state", "scan_state", "keys_before")


def layout(number: int, ranks: int) -> dict[str, Any]:
    """Documents, cuts and labels of a row; the first few are the odd ones."""
    rng = random.Random(number)
    lengths = [rng.choice((1, 1, 2, 3, rng.randint(4, 60))) for _ in range(rng.randint(1, 7))]
    total = sum(lengths)
    cuts = sorted(rng.randint(0, total) for _ in range(ranks - 1))
    if number == 0:  # one document, through all
        lengths, total = [97], 97
        cuts = [97 * (rank + 1) // ranks for rank in range(ranks - 1)]
    elif number == 1:  # at the documents' borders, empty documents among them
        lengths, total = [9, 0, 20, 0, 11, 13, 0], 53
        cuts = ([9, 29, 40] if ranks == 4 else [29])[: ranks - 1]
    elif number == 2:  # fewer tokens than ranks
        lengths, total, cuts = [2], 2, [0, 1, 1][: ranks - 1]
    elif number == 3:  # all on the last rank
        cuts = [0] * (ranks - 1)
    elif number == 4:  # all on the first
        cuts = [total] * (ranks - 1)
    elif number == 5:  # shares shorter than the convolution's reach, behind a long one
        lengths, total = [60, 5], 65
        cuts = [55, 56, 58][-(ranks - 1) :]
    borders = [0]
    for length in lengths:
        borders.append(borders[-1] + length)
    ids = torch.tensor([[rng.randrange(96) for _ in range(total)]])
    density = rng.choice((0.0, 0.1, 0.5, 1.0))
    targets = torch.tensor([[rng.randrange(96) if rng.random() < density else -100 for _ in range(total)]])
    for end in borders[1:]:
        if end:
            targets[0, end - 1] = -100
    weights = torch.tensor([[rng.random() for _ in range(total)]], dtype=torch.float64)
    return {
        "cut": RowCut(tuple(borders), (0, *cuts, total)),
        "ids": ids,
        "targets": targets,
        "weights": weights if number % 3 == 0 else None,
    }


def run(model: Any, case: dict[str, Any], tokens: slice, borders: list[int], **more: Any) -> float:
    """Forward and backward of some of the row's tokens; the summed loss over 7."""
    cu_seqlens = torch.tensor(borders, dtype=torch.int32)
    weights = case["weights"]
    output = model(
        input_ids=case["ids"][:, tokens],
        shift_labels=case["targets"][:, tokens],
        loss_weights=None if weights is None else weights[:, tokens],
        cu_seq_lens_q=cu_seqlens,
        cu_seq_lens_k=cu_seqlens,
        max_length_q=500,
        max_length_k=500,
        num_items_in_batch=torch.tensor(7.0, dtype=torch.float64),
        use_cache=False,
        **more,
    )
    output.loss.backward()
    return output.loss.item()


def gradients(model: Any) -> list[Tensor]:
    """Of all that is trained, each of which must have one."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found.append(parameter.grad)
            parameter.grad = None
    return found


def compare(model: Any, case: dict[str, Any], ranks: Ranks, judge: int = 0) -> tuple[float, float, Counter[str]]:
    """How far the shares are off the whole in loss and gradients, relative to the largest of each tensor; and what came
    in here. The rank `judge` of the group does the whole, and it alone is told."""
    cut: RowCut = case["cut"]
    exchange = Exchange(ranks)
    share = RowShare(cut, ranks, exchange)
    mine = run(model, case, slice(*cut.share(ranks.rank)), cut.borders_of(ranks.rank), row_share=share)
    summed = gradients(model)
    flat = torch.cat([torch.tensor([mine], dtype=torch.float64), *(gradient.flatten() for gradient in summed)])
    distributed.all_reduce(flat, group=ranks.group)
    if ranks.rank != judge:
        return 0.0, 0.0, exchange.moved
    whole = run(model, case, slice(None), list(cut.borders))
    worst = 0.0
    expected = gradients(model)
    for gradient, found in zip(expected, flat[1:].split([g.numel() for g in summed]), strict=True):
        off = (found - gradient.flatten()).abs().max().item()
        worst = max(worst, off / max(gradient.abs().max().item(), 1e-3))
    return abs(flat[0].item() - whole) / max(abs(whole), 1e-3), worst, exchange.moved


def with_adapters(model: Any, dropout: float = 0.0) -> Any:
    from peft import LoraConfig, get_peft_model

    targets = ["Wqkv", "in_proj", "x_proj", "fc1", "out_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, lora_dropout=dropout)
    return get_peft_model(model, config).double()


def nothing_before(name: str) -> Any:
    """A share that leaves out what one of its methods fetches."""
    original = getattr(RowShare, name)

    def method(self: RowShare, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if name != "keys_before":
            return found * 0
        return tuple(torch.cat([x[: len(x) - len(own)] * 0, own]) for x, own in zip(found, args[:2], strict=True))

    return patch.object(RowShare, name, method)


def cases_of(model: Any, ranks: Ranks, half: int, halves: int) -> dict[str, Any]:
    """All cases of a group of ranks; where several groups have part in them, each does its own."""
    size, found = ranks.size, {}
    mine = [number for number in range(LAYOUTS // halves) if number % halves == half]
    found["layouts"] = [compare(model, layout(n, size), ranks, n // halves % size)[:2] for n in mine]
    found["naive"] = {}
    for name in NAIVE:
        with nothing_before(name):
            found["naive"][name] = compare(model, layout(0, size), ranks)[:2]
    found["moved"] = [compare(model, long_row(length, size), ranks)[2] for length in (120, 240)]
    model.gradient_checkpointing_enable()
    found["checkpointing"] = [compare(model, layout(n, size), ranks)[:2] for n in (0, 2, 5, 6)]
    model.gradient_checkpointing_disable()
    adapted = with_adapters(copy.deepcopy(model))
    found["adapters"] = [compare(adapted, layout(n, size), ranks, n % size)[:2] for n in range(8)]
    found["probe"] = {name: probed(ranks, name) for name in (None, *NAIVE)}
    return found


def probed(ranks: Ranks, naive: str | None) -> str:
    """What the probe at a stage's start says, where one of a share's methods fetches nothing."""
    model = tiny_model(sliding_window=WINDOW)
    collator = ShareCollator(PackedCollator(0), TokenCosts.of(model), ranks.rank, ranks.size)
    path = TrainedPath(checkpointing={"use_reentrant": False} if naive is None else None)
    if naive is None:
        model = with_adapters(model, dropout=0.5)
    try:
        with nothing_before(naive) if naive else nullcontext():
            sharing_probe(model, collator, ranks, path)
    except UserError as error:
        return str(error)
    return "passed"


def long_row(length: int, size: int) -> dict[str, Any]:
    """One document in equal shares."""
    cut = RowCut((0, length), tuple(length * part // size for part in range(size + 1)))
    ids = torch.arange(length + 1)[None] % 96
    return {"cut": cut, "ids": ids[:, :-1], "targets": ids[:, 1:], "weights": None}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    pairs = [distributed.new_group([first, first + 1]) for first in (0, 2)]
    model = tiny_model(dtype=torch.float64, sliding_window=WINDOW).train()
    results = {
        "4": cases_of(model, Ranks(rank, 4, distributed.group.WORLD), 0, 1),
        "2": cases_of(model, Ranks(rank % 2, 2, pairs[rank // 2]), rank // 2, 2),
    }
    (folder / f"shares-{rank}.json").write_text(json.dumps(results))
