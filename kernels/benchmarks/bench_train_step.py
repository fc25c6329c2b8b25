"""Tokens per second of a training step, in float32 and in bfloat16: a small SambaY and a Llama of the same size.

    python kernels/benchmarks/bench_train_step.py --tokens 512 2048 8192 --threads 2

A step is forward, backward, clipping and fused AdamW on one packed row of seven documents, kept apart in both models;
weights are in float32, bfloat16 is autocast's. Rows have about the same length, each round's one that no round before
it had, as packed rows do in training; both models take them as the trainer gives them to any model (filled up to equal
numbers of rows for bfloat16 on a CPU: `sft.models.rounded_rows`). `tiny` is the shape of the recipe of that name, at
its row's length and at half of that. All cases take turns in every round, so that a busy machine slows all of them;
the table shows medians. CPU seconds, of all threads together, hold on a busy machine, where the clock doesn't.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import parser, prepare, report
from sambay_kernels import why
from torch import nn
from transformers import LlamaForCausalLM

from sft.models.rounded_rows import rounded_rows
from sft.models.sized import SMALL, TINY, llama_of, parameters, random_sambay
from sft.utils.memory import keep_freed_memory

TINY_TOKENS = (512, 1024)
LENGTHS = (531, 112, 307, 224, 95, 448, 331)  # of the documents, in parts of 2,048
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
LESS = 3
"""Tokens that a round's row has less than the row of the round before it."""
WARM_UP = 2
Step = Callable[[dict[str, Any]], float]


def llama(shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama of the same width, depth and number of parameters."""
    return llama_of(parameters(random_sambay(shape)), shape)


def batch(tokens: int, vocabulary: int, device: str) -> dict[str, Any]:
    """One packed row as the collator makes it: ids, labels, borders, positions that restart with each document."""
    generator = torch.Generator().manual_seed(0)
    lengths = [length * tokens // sum(LENGTHS) for length in LENGTHS]
    lengths[-1] += tokens - sum(lengths)
    borders = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)
    ids = torch.randint(1, vocabulary, (1, tokens), generator=generator).to(device)
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


def stepper(model: nn.Module, device: str, dtype: torch.dtype | None) -> Step:
    """A function that does one training step on a row and returns its loss."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    compiled = device == "cpu" and dtype is not None

    def step(inputs: dict[str, Any]) -> float:
        autocast = torch.autocast(torch.device(device).type, dtype=dtype, enabled=dtype is not None)
        with autocast, rounded_rows(model, compiled):
            loss: torch.Tensor = model(**inputs).loss
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def plain(packed: dict[str, Any]) -> dict[str, Any]:
    """The row without its borders, which transformers' Llama finds in the positions."""
    return {name: packed[name] for name in ("input_ids", "labels", "position_ids")} | {"use_cache": False}


def cases(shape: dict[str, Any], device: str, precisions: list[str]) -> dict[tuple[str, str], tuple[int, Step]]:
    """By model and precision: its parameters and its step."""
    return {
        (name, precision): (parameters(model := build(shape)), stepper(model, device, PRECISIONS[precision]))
        for name, build in (("SambaY", random_sambay), ("Llama", llama))
        for precision in precisions
    }


def measure(shape: dict[str, Any], tokens: int, what: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of one length of a packed row."""
    found = cases(shape, options.device, options.precision)
    clock: dict[tuple[str, str], list[float]] = {case: [] for case in found}
    busy: dict[tuple[str, str], list[float]] = {case: [] for case in found}
    for turn in range(options.rounds + WARM_UP):
        row = batch(tokens - LESS * turn, shape["vocab_size"], options.device)
        for case, (_, step) in found.items():
            inputs = row if case[0] == "SambaY" else plain(row)
            start, start_busy = time.perf_counter(), time.process_time()
            step(inputs)
            if turn >= WARM_UP:
                clock[case].append(time.perf_counter() - start)
                busy[case].append(time.process_time() - start_busy)
    seconds = {case: statistics.median(times) for case, times in clock.items()}
    return [
        {
            "row": what,
            "model": name,
            "precision": precision,
            "parameters": found[name, precision][0],
            "ms a step": 1e3 * seconds[name, precision],
            "tokens/s": tokens / seconds[name, precision],
            "times Llama": seconds["Llama", precision] / seconds[name, precision],
            "times float32": seconds[name, "float32"] / seconds[name, precision]
            if (name, "float32") in found
            else None,
            "CPU ms": 1e3 * statistics.median(busy[name, precision]),
        }
        for name, precision in found
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="lengths of the packed row")
    options.add_argument("--precision", nargs="+", choices=tuple(PRECISIONS), default=list(PRECISIONS))
    options.add_argument("--rounds", type=int, default=7, help="measured steps of each case")
    chosen = options.parse_args()
    prepare(chosen)
    keep_freed_memory()
    rows: list[dict[str, Any]] = []
    for name, shape, lengths in (("tiny", TINY, TINY_TOKENS), ("small", SMALL, chosen.tokens)):
        for tokens in lengths:
            rows += measure(shape, tokens, f"{name}, {tokens:,}", chosen)
    backends = {op: why(op, chosen.device).backend for op in ("selective_scan", "differential_attention")}
    title = f"Training step: one row packed with {len(LENGTHS)} documents, medians of {chosen.rounds} rounds"
    report(title, rows, chosen, "backends: " + ", ".join(f"{op} {name}" for op, name in backends.items()))


if __name__ == "__main__":
    main()
