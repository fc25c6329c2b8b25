"""A benchmark from a model to its rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sft.generate.bench.answers import Tick, measure_answers
from sft.generate.bench.curves import Curves, Fit, curve_rows, fits, whole_rows
from sft.generate.bench.rows import ENGINE, GRAPH, LLAMA, OWN, Row
from sft.generate.bench.steps import bandwidth, bytes_read
from sft.generate.bench.workloads import Workload
from sft.models.sized import parameters, transformer_beside

_MARKS = (4096, 8192, 16384)


@dataclass
class Found:
    """Rows, and where lengths were measured how times grow with them."""

    rows: list[Row]
    fits: list[Fit] = field(default_factory=list)


class Bench:
    """A model and what it is measured beside.

    Args:
        model: ours; moved and cast as is said, and in eval mode from now on.
        beside: of OWN, LLAMA and GRAPH, the last on a GPU.
        rounds: of each measurement; the fastest counts.
    """

    def __init__(
        self, model: Any, beside: Sequence[str], *, device: str, dtype: torch.dtype, rounds: int, tick: Tick
    ) -> None:
        self.rounds, self.tick = rounds, tick
        self.device, self.dtype = torch.device(device), dtype
        self.models: dict[str, Any] = {ENGINE: model.to(self.device, dtype).eval()}
        if OWN in beside:
            self.models[OWN] = model
        others = [side for side in (LLAMA, GRAPH) if side in beside]
        if others:
            with self.device:
                other: Any = transformer_beside(model)
            self.models |= dict.fromkeys(others, other.to(self.device, dtype).eval())

    @property
    def parameters(self) -> dict[str, int]:
        """How many each side's model has."""
        return {side: parameters(model) for side, model in self.models.items()}

    def answers(self, works: Sequence[Workload], seed: int) -> Found:
        """Whole answers, as they are made."""
        return Found(measure_answers(self.models, works, rounds=self.rounds, seed=seed, tick=self.tick))

    def paper(self, requests: Sequence[int], prompt: int, new: int) -> Found:
        """The protocol of arXiv 2507.06607: steps at some lengths on the way from the prompt to the end, and what the
        whole answer takes by them; lengths in between are interpolated."""
        last = prompt + new
        lengths = sorted({prompt, *(mark for mark in _MARKS if prompt < mark < last), last})
        curves = self._curves(inner=False)
        speed = bandwidth(self.device) if self.device.type == "cuda" else None
        found = curves.measure(requests, lengths, [prompt])
        floor = {
            count: {length: bytes_read(curves.weights, count, length) / speed for length in lengths}
            for count in requests
            if speed
        }
        rows = curve_rows(found, lengths, floor) + whole_rows(found, prompt, new, floor)
        return Found(rows, fits(found))

    def sweep(self, requests: Sequence[int], lengths: Sequence[int]) -> Found:
        """Steps and prompts at every length, of the engine also without the layers whose attention sees everything."""
        found = self._curves(inner=True).measure(requests, sorted(lengths), sorted(lengths))
        return Found(curve_rows(found, sorted(lengths), {}), fits(found))

    def _curves(self, *, inner: bool) -> Curves:
        return Curves(self.models, inner=inner, rounds=self.rounds, tick=self.tick)
