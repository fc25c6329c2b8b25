"""A decoding step at a given length, without the tokens before it being made: keys and values of any content stand in.

The engine's step is the one its batches take. Others step by the model's forward over the cache that `generate` takes,
without what `generate` does around it; or from a CUDA graph, where the host takes no part.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from sambay_kernels import AttentionWeights, DecoderStep, DecoderWeights
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from sft.generate.cache import cache_keyword
from sft.generate.requests import Request
from sft.generate.sampling import SamplingParams
from sft.generate.states import PAGE, States
from sft.generate.steps import STRIDE, steps_for

_TOKENS = 16
"""That are made to be timed."""
_FILL = 0.01  # memory that nobody has written to is one page of zeros: it is read faster than any other
_READ_FIRST = 64


class Stepper(NamedTuple):
    """Makes the next `tokens` tokens of each sequence."""

    run: Callable[[], object]
    tokens: int

    def seconds(self, device: torch.device) -> float:
        """Of a step: the fastest of some calls, which others that use the machine disturb least."""
        fastest = math.inf
        for _ in range(-(-_TOKENS // self.tokens)):
            _wait(device)
            start = time.perf_counter()
            self.run()
            _wait(device)
            fastest = min(fastest, time.perf_counter() - start)
        return fastest / self.tokens


Maker = Callable[[int, int], Stepper]
"""Of so many sequences of such a length."""


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def by_engine(step: DecoderStep) -> Maker:
    """The engine's, sampled as the published protocol has it."""

    def make(requests: int, length: int) -> Stepper:
        longest = length + 2 * STRIDE
        states = States(step.weights, slots=requests, longest=longest, pages=requests * -(-longest // PAGE) + 1)
        held = states.tensors
        for tensor in (held.page_keys, held.page_values, held.ring_keys, held.ring_values):
            tensor.fill_(_FILL)
        params = SamplingParams(max_new_tokens=1 << 16, temperature=0.6, top_p=0.95)
        rows = [Request(i, i, [1], params, frozenset(), ids=[1], slot=states.take_slot() or 0) for i in range(requests)]
        for row in rows:
            states.room_for(row.slot, longest)
        steps = steps_for(step, states)

        def run() -> None:
            held.lengths[:requests] = length
            for row in rows:
                row.read = row.length - 1
            steps(rows)

        return Stepper(run, steps.stride)

    return make


def without_full_attention(weights: DecoderWeights) -> DecoderWeights:
    """The same model less the layers whose attention sees everything: what is left should take the same time always."""

    def sees_all(mixer: object) -> bool:
        return isinstance(mixer, AttentionWeights) and mixer.window is None

    return replace(weights, layers=tuple(layer for layer in weights.layers if not sees_all(layer.mixer)))


def by_forward(model: Any) -> Maker:
    """transformers' own cache and attention, as in `generate`."""

    def make(requests: int, length: int) -> Stepper:
        token = torch.ones(requests, 1, dtype=torch.long, device=model.device)
        cache = _cache_at(model, requests, length)
        return Stepper(partial(model, input_ids=token, use_cache=True, **{cache_keyword(model): cache}), 1)

    return make


def _cache_at(model: Any, requests: int, length: int) -> DynamicCache:
    """A cache that holds `length` tokens: those that a window or a state keeps are read, the others stand there."""
    config = model.config.get_text_config()
    cache = DynamicCache(config=config)
    first = min(length, max(_READ_FIRST, getattr(config, "sliding_window", None) or 0))
    ids = torch.ones(requests, first, dtype=torch.long, device=model.device)
    model(input_ids=ids, use_cache=True, logits_to_keep=1, **{cache_keyword(model): cache})
    layers: list[Any] = cache.layers
    for layer in layers:
        kind = type(layer)
        if kind is DynamicLayer and layer.get_seq_length():
            more = (*layer.keys.shape[:2], length - first, layer.keys.shape[3])
            layer.keys = torch.cat([layer.keys, layer.keys.new_full(more, _FILL)], dim=2)
            layer.values = torch.cat([layer.values, layer.values.new_full(more, _FILL)], dim=2)
        elif hasattr(layer, "cumulative_length"):
            layer.cumulative_length = length
    return cache


def by_graph(model: Any) -> Maker:
    """A static cache just long enough, and the step recorded as a CUDA graph: what `generate` doesn't do by itself."""

    def make(requests: int, length: int) -> Stepper:
        given = {
            "input_ids": torch.ones(requests, 1, dtype=torch.long, device=model.device),
            "position_ids": torch.full((requests, 1), length, device=model.device),
            "attention_mask": torch.ones(requests, 1, 1, length + 1, dtype=torch.bool, device=model.device),
            cache_keyword(model): StaticCache(config=model.config, max_cache_len=length + 1),
        }
        model(**given)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(**given)

        def run(given: Any = given) -> None:  # what the graph reads has to live as long
            graph.replay()

        return Stepper(run, 1)

    return make


def bytes_read(weights: DecoderWeights, requests: int, length: int) -> int:
    """What a step has to read: all matrices, and of each sequence the states, the windows and all keys and values."""
    mixers = [value for layer in weights.layers for value in vars(layer.mixer).values()]
    inside = [value for layer in weights.layers for value in (layer.fc1, layer.fc2)]
    fixed = sum(x.nbytes for x in [*mixers, *inside, weights.head] if isinstance(x, Tensor))
    readers = len(weights.layers) - len(without_full_attention(weights).layers)
    of_token = 2 * weights.key_heads * weights.head_dim * weights.embed.element_size()
    wide = max(4, weights.embed.element_size())
    states = sum(2 * (m.A.numel() * wide + (m.conv_weight[:, 1:].numel() * weights.embed.element_size()))
                 for m in weights.mambas)  # fmt: skip
    windows = sum(min(length, m.window or 0) for m in weights.windows)
    return fixed + requests * (states + of_token * (windows + readers * length))


def bandwidth(device: torch.device) -> float:
    """Bytes per second that a copy of 4 GB reads and writes on a GPU."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = Stepper(lambda: target.copy_(source), 1)
    copy.seconds(device)
    return 2 * source.numel() / copy.seconds(device)


def free(device: torch.device) -> None:
    """Give back what nobody uses any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
