"""Decoding at the published size with random weights, on a GPU, beside a transformer of that size.

    python kernels/benchmarks/published_decode.py --device cuda [--requests 1 4 16] [--prompt 2048] [--new 32768]
        [--profile] [--out FILE]

The 2K + 32K protocol of arXiv 2507.06607: seconds of a step at several lengths on the way from the prompt to the end,
what the whole answer takes by them (lengths between are interpolated), the prompt's prefill, and the share of the
memory's bandwidth that a step reaches: the bytes of weights, keys, values and states that it has to read, over what the
card reads in the time. bfloat16; sampled at temperature 0.6 and top-p 0.95; the engine's own steps.

The transformer has Phi-4-mini's shape and is run by transformers: its own cache and attention (as in `generate`); with
--graph also by a static cache and a CUDA graph, where its host takes no part.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from machine import parser, prepare, report
from published_step import PHI_4_MINI
from sambay_kernels import DecoderStep, DecoderWeights
from torch import Tensor
from transformers import DynamicCache, Phi3Config, Phi3ForCausalLM, StaticCache

from sft.generate.cache import cache_keyword
from sft.generate.requests import Request
from sft.generate.sampling import SamplingParams
from sft.generate.states import PAGE, States
from sft.generate.steps import STRIDE, GraphSteps
from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
from sft.models.sambay_decoding import decoder_weights

Times = dict[int, float]


def timed(run: Callable[[], object], repeats: int) -> float:
    """Seconds of a call, the GPU's work included."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def bandwidth() -> float:
    """Bytes per second that a copy of 4 GB reads and writes here."""
    source = torch.empty(2 * 1024**3, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / timed(lambda: target.copy_(source), 10)


def sambay() -> Any:
    """The default configuration is the published one."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = Phi4FlashForCausalLM(Phi4FlashConfig())
    return model.to(torch.bfloat16).eval()


def phi_4_mini() -> Any:
    """Phi-4-mini's shape."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        model: Any = Phi3ForCausalLM(Phi3Config(**{**PHI_4_MINI, "use_cache": True}))
    return model.to(torch.bfloat16).eval()


def taken(states: States, requests: int) -> list[Request]:
    """Requests under way, sampled as the published protocol has it."""
    params = SamplingParams(max_new_tokens=1 << 20, temperature=0.6, top_p=0.95)
    slots = [states.take_slot() for _ in range(requests)]
    return [Request(i, i, [1], params, frozenset(), ids=[1], slot=slot or 0, read=1) for i, slot in enumerate(slots)]


def own_steps(weights: DecoderWeights, requests: int, lengths: list[int]) -> tuple[Times, Times]:
    """Seconds of a step with so many tokens before it, and the bytes that it reads."""
    longest = max(lengths) + 4 * STRIDE
    pages = requests * -(-longest // PAGE) + 1
    states = States(weights, slots=requests, longest=longest, pages=pages)
    steps = GraphSteps(DecoderStep(weights), states)
    rows = taken(states, requests)
    seconds: Times = {}
    read: Times = {}
    fixed = sum(x.numel() * x.element_size() for x in _matrices(weights))
    of_slot = sum(x[:, 0].numel() * x.element_size() for x in (states.tensors.conv, states.tensors.scan)) * 2
    of_slot += 2 * states.tensors.ring_keys[:, 0].numel() * 2
    of_token = 2 * weights.key_heads * weights.head_dim * 2 * _readers(weights)
    for length in lengths:
        for one in rows:
            states.room_for(one.slot, length + 4 * STRIDE)
            states.tensors.lengths[one.slot] = length
        seconds[length] = timed(lambda: steps(rows), 2) / STRIDE
        read[length] = fixed + requests * (of_slot + of_token * length)
    return seconds, read


def _matrices(weights: DecoderWeights) -> list[Tensor]:
    mixers = [value for layer in weights.layers for value in vars(layer.mixer).values()]
    inside = [value for layer in weights.layers for value in (layer.fc1, layer.fc2)]
    return [x for x in [*mixers, *inside, weights.head] if isinstance(x, Tensor)]


def _readers(weights: DecoderWeights) -> int:
    """Layers that read keys and values of all tokens."""
    return sum(getattr(layer.mixer, "qkv", None) is not None and layer.mixer.window is None for layer in weights.layers)  # type: ignore[union-attr]


def cache_steps(model: Any, requests: int, lengths: list[int]) -> Times:
    """Seconds of a step of the transformer; keys and values are zeros."""
    config, seconds = model.config, {}
    shape = (requests, config.num_key_value_heads, 0, config.hidden_size // config.num_attention_heads)
    for length in lengths:
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            held = torch.zeros(*shape[:2], length, shape[3], dtype=torch.bfloat16, device="cuda")
            cache.update(held, held.clone(), layer)
        token = torch.ones(requests, 1, dtype=torch.long, device="cuda")
        with torch.no_grad():
            seconds[length] = timed(partial(model, input_ids=token, **{cache_keyword(model): cache}), 8)
        del cache
        torch.cuda.empty_cache()
    return seconds


def graph_steps(model: Any, requests: int, lengths: list[int]) -> Times:
    """Seconds of a step of the transformer over a static cache just long enough, recorded as a CUDA graph.

    What transformers' `generate` doesn't do by itself: the host takes no part, so this is what its kernels can do.
    """
    seconds = {}
    for length in lengths:
        cache = StaticCache(config=model.config, max_cache_len=length + 1)
        given = {
            "input_ids": torch.ones(requests, 1, dtype=torch.long, device="cuda"),
            "position_ids": torch.full((requests, 1), length, device="cuda"),
            "attention_mask": torch.ones(requests, 1, 1, length + 1, dtype=torch.bool, device="cuda"),
            cache_keyword(model): cache,
        }
        with torch.no_grad():
            model(**given)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                model(**given)
        seconds[length] = timed(graph.replay, 8)
        del cache, given, graph
        gc.collect()
        torch.cuda.empty_cache()
    return seconds


def prefill(model: Any, prompt: int) -> float:
    """Seconds for one prompt."""
    ids = torch.ones(1, prompt, dtype=torch.long, device="cuda")
    with torch.no_grad():
        return timed(lambda: model(input_ids=ids, use_cache=True, logits_to_keep=1), 3)


def whole(times: Times, first: int, last: int) -> float:
    """Seconds of all steps from `first` to `last` tokens, linear between the lengths measured."""
    marks, total = sorted(times), 0.0
    for low, high in pairwise(marks):
        begin, end = max(low, first), min(high, last)
        if end > begin:
            at = [times[low] + (times[high] - times[low]) * (x - low) / (high - low) for x in (begin, end)]
            total += (end - begin) * sum(at) / 2
    return total


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of requests and length."""
    last = options.prompt + options.new
    lengths = sorted({options.prompt, 4096, 8192, 16384, last} & set(range(options.prompt, last + 1)))
    speed = bandwidth()
    own, read, first = {}, {}, {}
    model = sambay()
    weights = decoder_weights(model)
    assert weights is not None
    first["own"] = prefill(model, options.prompt)
    for requests in options.requests:
        own[requests], read[requests] = own_steps(weights, requests, lengths)
        gc.collect()
        torch.cuda.empty_cache()
    if options.profile:
        profile(weights, options.requests[-1], lengths[-1])
    del model, weights
    gc.collect()
    torch.cuda.empty_cache()
    other, theirs, graphs = phi_4_mini(), {}, {}
    first["theirs"] = prefill(other, options.prompt)
    rows = []
    for requests in options.requests:
        theirs[requests] = cache_steps(other, requests, lengths)
        graphs[requests] = graph_steps(other, requests, lengths) if options.graph else {}
        for length in lengths:
            mine, its = own[requests][length], theirs[requests][length]
            floor = read[requests][length] / speed
            line = row(f"at {length:,}", requests, mine, its, floor / mine)
            rows.append({**line, "in a graph": 1e3 * graphs[requests][length] if options.graph else None})
        answer = [
            first[k] * requests + whole(t[requests], options.prompt, last)
            for k, t in (("own", own), ("theirs", theirs))
        ]
        floor = whole({n: b / speed for n, b in read[requests].items()}, options.prompt, last)
        line = row(f"{options.prompt:,} + {options.new:,}", requests, answer[0], answer[1], floor / answer[0], "s")
        recorded = first["theirs"] * requests + whole(graphs[requests], options.prompt, last)
        rows.append({**line, "in a graph": recorded if options.graph else None})
    print(f"copy: {speed / 1e12:.2f} TB/s; prefill of {options.prompt}: {first['own']:.3f} s, {first['theirs']:.3f} s")
    return rows


def row(what: str, requests: int, mine: float, its: float, share: float, unit: str = "ms") -> dict[str, Any]:
    """A line of the table."""
    scale = 1.0 if unit == "s" else 1e3
    times = {"SambaY": mine * scale, "transformer": its * scale}
    return {
        "tokens": what,
        "requests": requests,
        "unit": unit,
        **times,
        "times": its / mine,
        "share of bandwidth": share,
    }


def profile(weights: DecoderWeights, requests: int, length: int) -> None:
    """The kernels of a stride."""
    longest = length + 4 * STRIDE
    states = States(weights, slots=requests, longest=longest, pages=requests * -(-longest // PAGE) + 1)
    steps = GraphSteps(DecoderStep(weights), states)
    rows = taken(states, requests)
    for one in rows:
        states.room_for(one.slot, longest)
        states.tensors.lengths[one.slot] = length
    steps(rows)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        steps(rows)
    print(seen.key_averages().table(sort_by="cuda_time_total", row_limit=25, max_name_column_width=60))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--requests", type=int, nargs="+", default=[1, 4, 16], help="sequences at once")
    options.add_argument("--prompt", type=int, default=2048)
    options.add_argument("--new", type=int, default=32768)
    options.add_argument("--graph", action="store_true", help="the transformer's steps in a CUDA graph too")
    options.add_argument("--profile", action="store_true", help="print the kernels of the last case")
    chosen = options.parse_args()
    prepare(chosen)
    if not chosen.device.startswith("cuda"):
        raise SystemExit("published_decode.py: a model of 3.85 billion parameters needs --device cuda")
    report("Decoding at the published size", measure(chosen), chosen)


if __name__ == "__main__":
    main()
