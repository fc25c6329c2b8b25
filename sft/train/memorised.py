"""Token accuracy and entropy while a stage trains: what it knows by heart, by logging window, epoch and source.

Sums are whole numbers, so that they are the same in whatever order, on however many processes, and after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sft.train.agree import over_processes

if TYPE_CHECKING:
    from sambay_kernels.ops.linear_cross_entropy.tally import LceTally

    from sft.train.trainer import SambayTrainer

ACCURACY, ENTROPY = "mean_token_accuracy", "entropy"
"""TRL's names: the share of supervised tokens that are the likeliest ones, and the mean entropy there, in nats."""

EPOCH = "epoch_"
"""In front of the names of what an epoch came to."""

NAT = 1 << 24
"""Entropies are summed in parts of a nat, rounded as float32 rounds them: 10^9 tokens are far from filling int64."""


class TokenSums:
    """Correct tokens, entropy and number of all supervised tokens of a stage, by source; `epochs`: what each came to.

    `sources`: their names, in the order of a batch's `token_sources`; without any, all tokens are of one. `kept`: what
    `state` gave when the checkpoint was saved that training goes on from.
    """

    def __init__(self, sources: Sequence[str] = (), kept: Mapping[str, Any] | None = None) -> None:
        self._sources = list(sources) or [""]
        nothing = [[0, 0, 0] for _ in self._sources]
        before = dict(kept or {"total": nothing, "window": nothing, "epoch": nothing, "epochs": [], "told": 0})
        self.epochs: list[dict[str, float]] = list(before.pop("epochs"))
        self._told: int = before.pop("told")
        self._before: list[list[int]] = before.pop("total")
        self._since: dict[str, list[list[int]]] = before
        self._here: Tensor | None = None

    def add(self, tally: LceTally, inputs: Mapping[str, Any]) -> None:
        """Take in what the loss noted of a micro-batch, if it noted just its supervised tokens; nothing is waited for.

        `inputs`: the batch, with `num_supervised` and, where sources are told apart, `token_sources` (n,).
        """
        if sum(map(len, tally.correct)) != inputs["num_supervised"]:
            return  # a model whose own loss is none of ours, or more than one
        correct, entropy = torch.cat(tally.correct).long(), torch.cat(tally.entropy).double()
        noted = torch.stack([correct, (entropy * NAT).round().long(), torch.ones_like(correct)], 1)
        if self._here is None:
            self._here = noted.new_zeros(len(self._sources), 3)
        sources = inputs.get("token_sources")
        self._here.index_add_(0, noted.new_zeros(len(noted)) if sources is None else sources, noted)

    def mark(self) -> Tensor | None:
        """What `undo` goes back to."""
        return None if self._here is None else self._here.clone()

    def undo(self, mark: Tensor | None) -> None:
        """Take back what came after `mark`: the step was left out."""
        if self._here is not None:
            self._here = torch.zeros_like(self._here) if mark is None else mark

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps. All processes must call it."""
        return {"total": self._total(), **self._since, "epochs": self.epochs, "told": self._told}

    def window(self) -> dict[str, float]:
        """Accuracy and entropy since the last call, for a line of the log, and those of an epoch that has ended since.

        All processes must call it.
        """
        ended = self.epochs[-1] if len(self.epochs) > self._told else {}
        self._told = len(self.epochs)
        told = {EPOCH + name: value for name, value in ended.items() if name != "epoch"}
        return {**self._take("window"), **told}

    def end_epoch(self, epoch: float | None) -> None:
        """Note what the epoch came to that has ended here; an epoch that can't be told is left out."""
        found = self._take("epoch")
        if found:
            self.epochs.append({"epoch": round(epoch or 0.0, 6), **found})

    def _take(self, span: str) -> dict[str, float]:
        total = self._total()
        parts = [[a - b for a, b in zip(*pair, strict=True)] for pair in zip(total, self._since[span], strict=True)]
        self._since[span] = total
        logs = _means([sum(column) for column in zip(*parts, strict=True)], "")
        for source, part in zip(self._sources, parts, strict=True):
            if len(self._sources) > 1:
                logs |= _means(part, f"/{source}")
        return logs

    def _total(self) -> list[list[int]]:
        flat = [0] * (3 * len(self._sources)) if self._here is None else self._here.flatten().tolist()
        found = over_processes(flat)
        return [
            [known + found[3 * row + column] for column, known in enumerate(known_of_source)]
            for row, known_of_source in enumerate(self._before)
        ]


def _means(sums: Sequence[int], suffix: str) -> dict[str, float]:
    correct, entropy, count = sums
    if not count:
        return {}
    return {ACCURACY + suffix: round(correct / count, 6), ENTROPY + suffix: round(entropy / NAT / count, 6)}


class EpochEnds(TrainerCallback):
    """Takes an epoch's accuracy and entropy at its end, and at that of the stage."""

    def __init__(self, trainer: SambayTrainer) -> None:
        self._trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Before the step's own line of the log, which tells it."""
        if state.global_step % self._trainer.steps_of_an_epoch == 0 or state.global_step >= state.max_steps:
            self._trainer.token_sums.end_epoch(state.epoch)
