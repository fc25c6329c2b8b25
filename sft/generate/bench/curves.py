"""How the time of a token, and that until the first one, grow with the length; and whole answers by it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from sambay_kernels import DecoderStep, DecoderWeights

from sft.generate.bench import steps
from sft.generate.bench.answers import Tick
from sft.generate.bench.peak import Peak
from sft.generate.bench.rows import ENGINE, GRAPH, INNER, LLAMA, Row, beside_engine
from sft.generate.bench.sides import Side, by_engine, by_generate
from sft.generate.bench.steps import Maker, Stepper
from sft.generate.bench.workloads import even
from sft.models.sambay_decoding import decoder_weights
from sft.utils.errors import UsageError

Times = dict[int, float]
"""Seconds by length."""
_MOST_REPEATS, _WARM_UP = 4, 64


@dataclass
class Curve:
    """A side's times; a length that is missing had no memory."""

    steps: Times = field(default_factory=dict)
    first: Times = field(default_factory=dict)
    memory: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """How a side's times grow from the shortest length to the longest.

    Attributes:
        tokens: how many times as long a step takes.
        prefill: R^2 of a straight line through the times of the prompts; None: fewer than three were measured.
    """

    side: str
    requests: int
    tokens: float
    prefill: float | None


class Curves:
    """Measures the curves of all sides.

    Args:
        models: by side; ENGINE, OWN, LLAMA, GRAPH. In eval mode.

    Raises:
        UsageError: a model without a decoding step of its own.
    """

    def __init__(self, models: Mapping[str, Any], *, inner: bool, rounds: int, tick: Tick) -> None:
        weights = decoder_weights(models[ENGINE])
        if weights is None:
            raise UsageError(
                "steps can be measured of a plain SambaY model alone; of others, --workload measures answers"
            )
        self.weights: DecoderWeights = weights
        self.device = weights.embed.device
        self.models, self.rounds, self.tick = models, rounds, tick
        self.makers: dict[str, Maker] = {ENGINE: steps.by_engine(DecoderStep(weights))}
        if inner:
            self.makers[INNER] = steps.by_engine(DecoderStep(steps.without_full_attention(weights)))
        for side in [side for side in models if side != ENGINE]:
            self.makers[side] = (steps.by_graph if side == GRAPH else steps.by_forward)(models[side])
        self.done = self.total = 0

    def measure(
        self, requests: Sequence[int], lengths: Sequence[int], prompts: Sequence[int]
    ) -> dict[int, dict[str, Curve]]:
        """By number of requests, each side's curve: a step at every length, and one prompt of each of `prompts`."""
        self.total = len(prompts) * (self.rounds + 1) + len(requests) * len(lengths)
        first = self._prefill(prompts)
        found = {}
        for count in requests:
            found[count] = {side: Curve(first=first.get(side, {})) for side in self.makers}
            for length in lengths:
                for side, (seconds, memory) in self._steps(count, length).items():
                    found[count][side].steps[length] = seconds
                    found[count][side].memory[length] = memory
        return found

    def _prefill(self, prompts: Sequence[int]) -> dict[str, Times]:
        """Seconds until a prompt's first token."""
        sides: dict[str, Side] = {
            side: by_engine(model) if side == ENGINE else by_generate(model)
            for side, model in self.models.items()
            if side != GRAPH or LLAMA not in self.models  # a graph has no part in prompts
        }
        found: dict[str, Times] = {side: {} for side in sides}
        for turn in range(self.rounds + 1):  # the first is to warm up
            for length in prompts:
                # Short ones several times: what disturbs them is a larger share of their time.
                repeats = min(_MOST_REPEATS, max(prompts) // length) if turn else 1
                for side, complete in sides.items():
                    seconds = self._first_token(complete, length if turn else _WARM_UP, repeats, turn)
                    if turn and seconds is not None:
                        found[side][length] = min(seconds, found[side].get(length, seconds))
                self._tick()
        return found if GRAPH not in self.models or GRAPH in found else found | {GRAPH: found[LLAMA]}

    def _first_token(self, complete: Side, length: int, repeats: int, seed: int) -> float | None:
        """Seconds until it; None where memory ran out."""
        work, vocabulary = even(1, length, 1), self.models[ENGINE].config.get_text_config().vocab_size
        try:
            return min(
                complete(work.texts(vocabulary, seed * _MOST_REPEATS + repeat), work.answers)[0][0]
                for repeat in range(repeats)
            )
        except torch.OutOfMemoryError:
            return None

    @torch.no_grad()
    def _steps(self, requests: int, length: int) -> dict[str, tuple[float, int]]:
        """Seconds of a step of each side, the fastest of the rounds, in which they take turns; and its memory."""
        steppers: dict[str, Stepper] = {}
        found: dict[str, tuple[float, int]] = {}
        for turn in range(self.rounds + 1):  # the first is to warm up
            for side, make in self.makers.items():
                if turn and side not in found:
                    continue
                try:
                    if turn == 0:
                        with Peak(self.device) as peak:
                            steppers[side] = make(requests, length)
                            steppers[side].seconds(self.device)
                        found[side] = (math.inf, peak.bytes)
                    else:
                        fastest, memory = found[side]
                        found[side] = (min(fastest, steppers[side].seconds(self.device)), memory)
                except torch.OutOfMemoryError:
                    found.pop(side, None)
                    steppers.pop(side, None)
                    steps.free(self.device)
        steppers.clear()
        steps.free(self.device)
        self._tick()
        return found

    def _tick(self) -> None:
        self.done += 1
        self.tick(self.done, self.total)


def curve_rows(
    found: Mapping[int, Mapping[str, Curve]], lengths: Sequence[int], floor: Mapping[int, Times]
) -> list[Row]:
    """A row for each number of requests, length and side.

    `floor`: by number of requests, the seconds in which the bytes of the engine's step can be read.
    """
    rows = []
    for requests, sides in found.items():
        for length in lengths:
            least = floor.get(requests, {}).get(length)
            rows += beside_engine(
                _row(side, curve, requests, length, least if side == ENGINE else None) for side, curve in sides.items()
            )
    return rows


def _row(side: str, curve: Curve, requests: int, length: int, floor: float | None) -> Row:
    seconds = curve.steps.get(length)
    shortest = curve.steps.get(min(curve.steps, default=0))
    return Row(
        f"{requests} at {length:,}",
        side,
        requests,
        tokens_per_second=seconds and requests / seconds,
        first_token=curve.first.get(length),
        token=seconds,
        growth=seconds and shortest and seconds / shortest,
        memory=curve.memory.get(length),
        bandwidth=floor and seconds and floor / seconds,
        full=seconds is None,
        length=length,
    )


def whole_rows(
    found: Mapping[int, Mapping[str, Curve]], prompt: int, new: int, floor: Mapping[int, Times]
) -> list[Row]:
    """Of each number of requests and side, the whole of its answers: every prompt's prefill, then all steps."""
    rows = []
    for requests, sides in found.items():
        what = f"{requests} x ({prompt:,} + {new:,})"
        some = []
        for side, curve in sides.items():
            if prompt not in curve.first or not {prompt, prompt + new} <= curve.steps.keys():
                some.append(Row(what, side, requests, full=True))
                continue
            decoding = whole(curve.steps, prompt, prompt + new)
            seconds = requests * curve.first[prompt] + decoding
            least = floor.get(requests) if side == ENGINE else None
            some.append(
                Row(
                    what,
                    side,
                    requests,
                    seconds=seconds,
                    tokens_per_second=requests * new / seconds,
                    first_token=curve.first[prompt],
                    token=decoding / new,
                    growth=curve.steps[prompt + new] / curve.steps[prompt],
                    memory=curve.memory[prompt + new],
                    bandwidth=whole(least, prompt, prompt + new) / seconds if least else None,
                )
            )
        rows += beside_engine(some)
    return rows


def whole(times: Times, first: int, last: int) -> float:
    """Seconds of all steps from `first` to `last` tokens, linear between the lengths measured."""
    total = 0.0
    for low, high in pairwise(sorted(times)):
        begin, end = max(low, first), min(high, last)
        if end > begin:
            at = [times[low] + (times[high] - times[low]) * (x - low) / (high - low) for x in (begin, end)]
            total += (end - begin) * sum(at) / 2
    return total


def fits(found: Mapping[int, Mapping[str, Curve]]) -> list[Fit]:
    """Of every curve with two lengths."""
    return [
        Fit(side, requests, curve.steps[max(curve.steps)] / curve.steps[min(curve.steps)], straight(curve.first))
        for requests, sides in found.items()
        for side, curve in sides.items()
        if len(curve.steps) > 1
    ]


def straight(times: Times) -> float | None:
    """R^2 of a straight line through times by length; None for fewer than three."""
    if len(times) < 3:
        return None
    return statistics.correlation(list(map(float, times)), list(times.values())) ** 2
