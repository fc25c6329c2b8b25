"""Who answers: the engine, or transformers' `generate`; greedily, and no answer ends before it has all its tokens."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from sft.generate.engine import Engine
from sft.generate.requests import Request, TokenLogprobs
from sft.generate.sampling import SamplingParams

Prompts = Sequence[Sequence[int]]
Moments = list[list[float]]
"""For each request, when each of its tokens was there: seconds from the start."""
Side = Callable[[Prompts, Sequence[int]], Moments]
"""Completes prompts (token ids) by so many tokens each."""


@dataclass(eq=False)
class _Timed(Request):
    """A request that notes when its tokens come."""

    moments: list[float] = field(default_factory=list)

    def take(self, token: int, logprobs: TokenLogprobs | None = None) -> bool:
        self.moments.append(time.perf_counter())
        return super().take(token, logprobs)


class _TimedEngine(Engine):
    """An engine that keeps the requests of its last call."""

    asked: list[_Timed]

    def request(self, index: int, number: int, prompt: Sequence[int], params: SamplingParams) -> Request:
        made = super().request(index, number, prompt, params)
        self.asked.append(_Timed(made.index, made.number, made.prompt, made.params, made.ends))
        return self.asked[-1]


MOST_AT_ONCE = 64
"""Requests in a batch."""


def by_engine(model: Any) -> Side:
    """`Engine(model).generate`."""
    engine = _TimedEngine(model, None, eos_ids=())

    def complete(prompts: Prompts, answers: Sequence[int]) -> Moments:
        engine.asked, engine.batch_size = [], min(len(prompts), MOST_AT_ONCE)
        start = time.perf_counter()
        engine.generate(prompts, [SamplingParams(max_new_tokens=count) for count in answers])
        return [[moment - start for moment in request.moments] for request in engine.asked]

    return complete


class _Clock(BaseStreamer):
    """Notes when a batch's tokens come; the first that come are the prompts'."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: Any) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        pass


def by_generate(model: Any) -> Side:
    """`model.generate`: batches in the prompts' order, padded on the left; a batch ends with its longest answer."""
    device = model.device

    def complete(prompts: Prompts, answers: Sequence[int]) -> Moments:
        found: Moments = []
        start = time.perf_counter()
        for first in range(0, len(prompts), MOST_AT_ONCE):
            some, counts = prompts[first : first + MOST_AT_ONCE], answers[first : first + MOST_AT_ONCE]
            width, clock = max(map(len, some)), _Clock()
            ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in some], device=device)
            mask = torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in some], device=device)
            how = GenerationConfig(do_sample=False, max_new_tokens=max(counts), pad_token_id=0)
            model.generation_config = how  # nothing is taken from the model's own
            model.generate(input_ids=ids, attention_mask=mask, generation_config=how, streamer=clock)
            found += [[moment - start for moment in clock.moments[1 : count + 1]] for count in counts]
        return found

    return complete
