"""Tokens per second of a training step: a small SambaY, the same with a naive scan, and a Llama of the same size.

A step is forward, backward and AdamW on one packed row of 2,048 tokens, documents kept apart but in the last model. The
models take turns in every round, so that a busy machine slows all of them; the table shows medians. CPU seconds are
those of all threads together: they hold on a busy machine, where the clock doesn't.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from machine import parser, prepare, report
from sambay_kernels import why
from sambay_kernels.ops.selective_scan.inputs import ScanInputs
from sambay_kernels.ops.selective_scan.reference import selective_scan_reference
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sft.models.sambay import Phi4FlashConfig, Phi4FlashForCausalLM, modeling_phi4flash

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
LENGTHS = (531, 112, 307, 224, 95, 448, 331)  # of the documents, in parts of 2,048


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sambay() -> Phi4FlashForCausalLM:
    torch.manual_seed(0)
    return Phi4FlashForCausalLM(Phi4FlashConfig(**SHAPE, intermediate_size=1024, sliding_window=512))


def llama(wanted: int) -> LlamaForCausalLM:
    """A Llama of the same width and depth whose MLP is as wide as brings it to the wanted number of parameters."""

    def build(intermediate: int) -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SHAPE, intermediate_size=intermediate, tie_word_embeddings=True))

    start = 64
    a_column = SHAPE["num_hidden_layers"] * 3 * SHAPE["hidden_size"]
    return build(start + round((wanted - parameters(build(start))) / a_column))


def batch(tokens: int, device: str) -> dict[str, Any]:
    """One packed row as the collator makes it: ids, labels, borders, positions that restart with each document."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length * tokens // sum(LENGTHS) for length in LENGTHS]
    lengths[-1] += tokens - sum(lengths)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    ids = torch.randint(1, SHAPE["vocab_size"], (1, tokens), generator=generator).to(device)
    labels = ids.clone()
    labels[0, borders[:-1].long()] = -100
    positions = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": positions,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@contextmanager
def naive_scan() -> Iterator[None]:
    """The model with its scan replaced by a loop over tokens, which is what plain PyTorch code does."""
    fast = modeling_phi4flash.selective_scan
    modeling_phi4flash.selective_scan = lambda *args, **kw: selective_scan_reference(ScanInputs(*args, **kw))
    try:
        yield
    finally:
        modeling_phi4flash.selective_scan = fast


def stepper(model: torch.nn.Module, inputs: dict[str, Any], device: str) -> Callable[[], float]:
    """A function that does one training step and returns its loss."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        loss: Tensor = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    packed = batch(options.tokens, options.device)
    # Borders go to models that take them; transformers' Llama finds them in the positions.
    plain = {name: packed[name] for name in ("input_ids", "labels", "position_ids")}
    ours = sambay()
    models = {
        "SambaY": (ours, packed),
        "SambaY, naive scan": (sambay(), packed),
        "Llama": (llama(parameters(ours)), {**plain, "use_cache": False}),
        # Without positions the row is one document: what packing costs a model without borders is a dense mask.
        "Llama, documents mixed": (
            llama(parameters(ours)),
            {"input_ids": packed["input_ids"], "labels": packed["labels"], "use_cache": False},
        ),
    }
    sizes = {name: parameters(model) for name, (model, _) in models.items()}
    steps = {name: stepper(model, inputs, options.device) for name, (model, inputs) in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    busy: dict[str, list[float]] = {name: [] for name in models}
    losses: dict[str, float] = {}
    for turn in range(-1, options.rounds):  # the first round warms up
        for name, step in steps.items():
            start, start_busy = time.perf_counter(), time.process_time()
            if "naive" in name:
                with naive_scan():
                    loss = step()
            else:
                loss = step()
            if turn < 0:
                losses[name] = loss
            else:
                seconds[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - start_busy)
    if abs(losses["SambaY"] - losses["SambaY, naive scan"]) > 1e-4:
        raise SystemExit(f"the two scans disagree on the first loss: {losses}")
    base, base_busy = (statistics.median(x["SambaY"]) for x in (seconds, busy))
    return [
        {
            "model": name,
            "parameters": sizes[name],
            "seconds a step": statistics.median(times),
            "tokens/s": options.tokens / statistics.median(times),
            "times SambaY's": statistics.median(times) / base,
            "CPU seconds": statistics.median(busy[name]),
            "times SambaY's CPU": statistics.median(busy[name]) / base_busy,
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=2048, help="length of the packed row")
    options.add_argument("--rounds", type=int, default=5, help="measured steps of each model")
    chosen = options.parse_args()
    prepare(chosen)
    title = f"Training step: {chosen.tokens} tokens packed in {len(LENGTHS)} documents, float32, {chosen.rounds} rounds"
    backends = {op: why(op, chosen.device).backend for op in ("selective_scan", "differential_attention")}
    report(title, measure(chosen), chosen, "backends: " + ", ".join(f"{op} {name}" for op, name in backends.items()))


if __name__ == "__main__":
    main()
