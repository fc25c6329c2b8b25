"""What a training step takes more with another loss, or with accuracy and entropy noted, than with plain cross entropy.

    python kernels/benchmarks/bench_losses.py --threads 2 [--shape small --tokens 2048] [--rounds 15]

Steps as in `bench_train_step`, in float32, on one model; all cases take turns in every round, each round in another
order, so that a busy machine slows all of them. The table shows medians, and the median of what a round's case took
beside plain cross entropy in the same round.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from typing import Any

from bench_train_step import WARM_UP, batch, stepper
from machine import parser, prepare, report
from sambay_kernels import token_statistics

from sft.models.sized import SHAPES, random_sambay
from sft.recipe.loss_keys import LossSection
from sft.utils.memory import keep_freed_memory

PLAIN = "nll"
NOTED = "nll, accuracy and entropy noted"
LOSSES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    NOTED: {},
    "dft": {"type": "dft"},
    "power": {"type": "power", "alpha": 0.5},
    "threshold": {"type": "threshold", "threshold": 0.5},
    "label smoothing": {"label_smoothing": 0.1},
    "z-loss": {"z_loss": 1e-4},
}


def measure(options: Any) -> list[dict[str, Any]]:
    """A row for each loss."""
    shape = SHAPES[options.shape]
    inputs = batch(options.tokens, shape["vocab_size"], options.device)
    step = stepper(random_sambay(shape), options.device, None)
    said = {name: LossSection(**keys).options() for name, keys in LOSSES.items()}
    clock: dict[str, list[float]] = {name: [] for name in LOSSES}
    busy: dict[str, list[float]] = {name: [] for name in LOSSES}
    names = list(LOSSES)
    for turn in range(options.rounds + WARM_UP):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            asked = {**inputs, "loss_options": said[name]} if said[name] else inputs
            start, start_busy = time.perf_counter(), time.process_time()
            with token_statistics() if name == NOTED else nullcontext():
                step(asked)
            if turn >= WARM_UP:
                clock[name].append(time.perf_counter() - start)
                busy[name].append(time.process_time() - start_busy)

    def beside(times: dict[str, list[float]], name: str) -> float:
        ratios = (one / plain for one, plain in zip(times[name], times[PLAIN], strict=True))
        return 100 * (statistics.median(ratios) - 1)

    return [
        {
            "loss": name,
            "ms a step": 1e3 * statistics.median(clock[name]),
            "% more": beside(clock, name),
            "% more CPU": beside(busy, name),
        }
        for name in LOSSES
    ]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=tuple(SHAPES), default="small")
    options.add_argument("--tokens", type=int, default=2048, help="length of the packed row")
    options.add_argument("--rounds", type=int, default=15, help="measured steps of each loss")
    chosen = options.parse_args()
    prepare(chosen)
    keep_freed_memory()
    title = f"A training step of {chosen.shape}, {chosen.tokens:,} tokens, float32: medians of {chosen.rounds} rounds"
    report(title, measure(chosen), chosen)


if __name__ == "__main__":
    main()
