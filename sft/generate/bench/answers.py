"""Whole answers: all sides take turns, round by round; the fastest round of each counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from sft.generate.bench.peak import Peak
from sft.generate.bench.rows import ENGINE, Row, beside_engine
from sft.generate.bench.sides import Moments, Side, by_engine, by_generate
from sft.generate.bench.workloads import Workload

Tick = Callable[[int, int], None]
"""Told what is done of how much."""


def measure_answers(
    models: Mapping[str, Any], works: Sequence[Workload], *, rounds: int, seed: int, tick: Tick
) -> list[Row]:
    """A row for each workload and side.

    A side's memory is the most that a round took, with what was made before the first one, such as packed weights.

    Args:
        models: by side; the one named ENGINE by the engine, all others by their `generate`. In eval mode.
    """
    device = next(iter(models.values())).device
    made = {side: _make(side, model, device) for side, model in models.items()}
    count, rows = 0, []
    for work in works:
        trials = {side: _Trials(complete, work, held, device) for side, (complete, held) in made.items()}
        for turn in range(rounds + 1):  # the first is to warm up
            for side, one in trials.items():
                vocabulary = models[side].config.get_text_config().vocab_size
                one.run(vocabulary, seed + turn, warm_up=turn == 0)
                count += 1
                tick(count, len(works) * len(trials) * (rounds + 1))
        rows += beside_engine(one.row(side) for side, one in trials.items())
    return rows


def _make(side: str, model: Any, device: torch.device) -> tuple[Side, int]:
    """The side, and the bytes that it holds from now on."""
    with Peak(device) as peak:
        made = by_engine(model) if side == ENGINE else by_generate(model)
    return made, peak.bytes


class _Trials:
    """A side on a workload."""

    def __init__(self, complete: Side, work: Workload, held: int, device: torch.device) -> None:
        self.complete, self.work, self.held, self.device = complete, work, held, device
        self.seconds: list[float] = []
        self.best: Moments = []
        self.memory, self.full = 0, False

    def run(self, vocabulary: int, seed: int, *, warm_up: bool) -> None:
        """Answer once."""
        if self.full:
            return
        work = self.work.short() if warm_up else self.work
        try:
            with Peak(self.device) as peak:
                moments = self.complete(work.texts(vocabulary, seed), work.answers)
        except torch.OutOfMemoryError:
            self.full = True
            return
        if [len(one) for one in moments] != list(work.answers):
            raise RuntimeError("a side didn't make as many tokens as it was asked for")
        if warm_up:
            return
        seconds = max(one[-1] for one in moments)
        if seconds < min(self.seconds, default=float("inf")):
            self.best = moments
        self.seconds.append(seconds)
        self.memory = max(self.memory, peak.bytes + self.held)

    def row(self, side: str) -> Row:
        """What came of it."""
        requests = len(self.work.prompts)
        if self.full:
            return Row(self.work.what, side, requests, full=True)
        seconds = min(self.seconds)
        return Row(
            self.work.what,
            side,
            requests,
            seconds=seconds,
            tokens_per_second=sum(self.work.answers) / seconds,
            first_token=_mean(one[0] for one in self.best),
            token=_mean(pace(one) for one in self.best if len(one) > 1),
            growth=_mean(growth(one) for one in self.best if len(one) >= _QUARTERS),
            memory=self.memory,
            rounds=tuple(self.seconds),
        )


_QUARTERS = 16
"""Tokens of an answer from which on its quarters are looked at."""


def pace(moments: Sequence[float]) -> float:
    """Seconds between tokens, the mean."""
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def growth(moments: Sequence[float]) -> float | None:
    """The pace of the last quarter over that of the first; None where the first came all at once."""
    quarter = len(moments) // 4
    first, last = pace(moments[: quarter + 1]), pace(moments[-quarter - 1 :])
    return last / first if first else None


def _mean(values: Iterator[float | None]) -> float | None:
    found = [value for value in values if value is not None]
    return sum(found) / len(found) if found else None
