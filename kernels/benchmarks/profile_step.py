"""Where the time of a training step goes: the operations of a step of `bench_train_step`, by their own CPU time.

    python kernels/benchmarks/profile_step.py --threads 1 [--shape small --tokens 512] [--precision float32]

Means over five steps under torch's profiler, which itself takes time at every call: shares are to be believed, sums are
too large. Calls are those of one step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench_train_step import PRECISIONS, batch, stepper
from machine import parser, prepare, report
from torch.profiler import ProfilerActivity, profile

from sft.models.sized import SMALL, TINY, random_sambay
from sft.utils.memory import keep_freed_memory

SHAPES = {"tiny": TINY, "small": SMALL}
STEPS = 5


def shares(step: Callable[[], Any], most: int) -> list[dict[str, Any]]:
    """The operations that take most, and the rest in one line."""
    for _ in range(STEPS):
        step()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(STEPS):
            step()
    events = sorted(profiled.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)

    def row(name: str, some: Any) -> dict[str, Any]:
        own = sum(event.self_cpu_time_total for event in some)
        calls = sum(event.count for event in some) / STEPS
        return {"operation": name, "ms": own / STEPS / 1e3, "share": own / total, "calls": calls}

    rest = events[most:]
    return [*(row(event.key, [event]) for event in events[:most]), row(f"{len(rest)} others", rest)]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--shape", choices=tuple(SHAPES), default="tiny")
    options.add_argument("--tokens", type=int, default=1024, help="length of the packed row")
    options.add_argument("--precision", choices=tuple(PRECISIONS), default="bfloat16")
    options.add_argument("--most", type=int, default=20, help="operations with a line of their own")
    chosen = options.parse_args()
    prepare(chosen)
    keep_freed_memory()
    shape = SHAPES[chosen.shape]
    inputs = batch(chosen.tokens, shape["vocab_size"], chosen.device)
    step = stepper(random_sambay(shape), chosen.device, PRECISIONS[chosen.precision])
    rows = shares(lambda: step(inputs), chosen.most)
    report(f"A training step of {chosen.shape}, {chosen.tokens:,} tokens, {chosen.precision}", rows, chosen)


if __name__ == "__main__":
    main()
