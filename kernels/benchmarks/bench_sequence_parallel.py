"""A training pass against the length of its row: a small SambaY whole and in shares, and a Llama of its size.

    python kernels/benchmarks/bench_sequence_parallel.py --tokens 2048 4096 8192 16384 32768 65536 --ranks 4

A pass is forward and backward of one row of one document, float32, layers computed again, a thread a process; a pass of
at most 2,048 tokens goes before the one that is measured. `shares`: the row is shared by so many processes (gloo), as
`train.sequence_parallel_size` has it. On a machine with fewer cores than processes the clock says nothing of a cluster:
what a process computes is its CPU seconds, of which the busiest rank's are shown, exchanges included; and its memory
beside the model, of which the fullest rank's is. The Llama stops at `--llama`, where its attention takes minutes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import socket
import time
from typing import Any

import torch
from machine import parser, prepare, report

from sft.models.sized import TINY, llama_of, parameters, random_sambay

SHAPE = TINY | {"sliding_window": 512}
WARM, LIMIT = 2048, 3600.0


def row(tokens: int) -> dict[str, Any]:
    """A prepared row of one document, all of it trained."""
    ids = torch.randint(1, SHAPE["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    return {"input_ids": ids, "assistant_masks": [1] * tokens, "seq_lengths": [tokens]}


def one_pass(name: str, tokens: int, rank: int, ranks: int, port: int, said: Any) -> None:
    """What a process of a case measures: seconds and CPU seconds of its second pass, and MiB beside the model."""
    torch.set_num_threads(1)
    if ranks > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(ranks))
        torch.distributed.init_process_group("gloo")
    model: Any = random_sambay(SHAPE)
    if name == "Llama":
        model = llama_of(parameters(model), SHAPE)
    model.train()
    switch = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    switch({"use_reentrant": False})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for length in (min(tokens, WARM), tokens):
        inputs = inputs_of(model, name, length, rank, ranks)
        started, busy = time.perf_counter(), time.process_time()
        model(**inputs()).loss.backward()
        found = [time.perf_counter() - started, time.process_time() - busy]
        model.zero_grad()
    said.put([*found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024])


def inputs_of(model: Any, name: str, tokens: int, rank: int, ranks: int) -> Any:
    """Makes a pass's inputs, which hold an exchange of their own where rows are shared."""
    from sft.models.row_shares import TokenCosts
    from sft.train.collator import ROW_CUT, PackedCollator
    from sft.train.parallel.collate import ShareCollator
    from sft.train.parallel.exchange import Ranks
    from sft.train.parallel.share import RowShare
    from sft.train.probe import accepted_inputs

    collator: Any = PackedCollator()
    if ranks > 1:
        costs = TokenCosts.of(model)
        assert costs is not None
        collator = ShareCollator(collator, costs, rank, ranks)
    batch = collator([row(tokens)])
    if name == "Llama":
        kept = {key: batch[key] for key in ("input_ids", "labels", "position_ids")} | {"use_cache": False}
        return lambda: kept
    kept = accepted_inputs(model, batch) | {"use_cache": False, "num_items_in_batch": tokens}
    return lambda: kept | ({"row_share": RowShare(batch[ROW_CUT], Ranks(rank, ranks))} if ranks > 1 else {})


def case(name: str, tokens: int, ranks: int) -> dict[str, Any]:
    """A line of the table."""
    context = multiprocessing.get_context("spawn")
    said, port = context.Queue(), free_port()
    started = [
        context.Process(target=one_pass, args=(name, tokens, rank, ranks, port, said), daemon=True)
        for rank in range(ranks)
    ]
    for process in started:
        process.start()
    found = [said.get(timeout=LIMIT) for _ in started]
    for process in started:
        process.join(60)
    seconds, busy, memory = (max(each) for each in zip(*found, strict=True))
    return {
        "tokens": tokens,
        "model": name,
        "ranks": ranks,
        "seconds": seconds,
        "CPU s of a rank": busy,
        "us a token": 1e6 * sum(one[1] for one in found) / tokens,
        "MiB of a rank": round(memory),
    }


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def cases(chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """All lines, one process or group at a time."""
    found = []
    for tokens in chosen.tokens:
        for name, ranks in (("SambaY", 1), ("SambaY", chosen.ranks), ("Llama", 1)):
            if name != "Llama" or tokens <= chosen.llama:
                found.append(case(name, tokens, ranks))
                print(found[-1], flush=True)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192, 32768], help="lengths of the row")
    options.add_argument("--ranks", type=int, default=4, help="processes that share a row")
    options.add_argument("--llama", type=int, default=16384, help="the longest row of the Llama")
    chosen = options.parse_args()
    prepare(chosen)
    report("A training pass, float32, one document", cases(chosen), chosen, note=f"shape: {SHAPE}")


if __name__ == "__main__":
    main()
