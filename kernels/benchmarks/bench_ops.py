"""Every op on every backend that runs here, forward and forward + backward, side by side.

Selective scan at the size the project quotes (2,048 tokens, 512 channels, 16 states, three documents); the other ops at
sizes of the same small model. Backends take turns in every round; the table shows medians in milliseconds.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import parser, prepare, report
from sambay_kernels import (
    BackendError,
    causal_conv1d,
    differential_attention,
    gmu_gate,
    linear_cross_entropy,
    selective_scan,
    why,
)
from torch import Tensor

TOKENS, CHANNELS, STATES, HEADS, WIDTH, VOCABULARY = 2048, 512, 16, 4, 64, 4096
BORDERS = (0, 700, 701, 2048)
BACKENDS = ("cuda", "triton", "cpp", "torch", "reference")


def cases(device: str) -> dict[str, tuple[Callable[..., Tensor], list[Tensor]]]:
    """Each op as a function of leaves that want gradients."""
    torch.manual_seed(0)
    borders = torch.tensor(BORDERS, dtype=torch.int32, device=device)
    labels = torch.randint(0, VOCABULARY, (TOKENS,), device=device)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, requires_grad=True)

    decay = (-torch.arange(1.0, STATES + 1, device=device).repeat(CHANNELS, 1)).requires_grad_()
    wide, maps = (TOKENS, CHANNELS), (TOKENS, STATES)
    heads, keys = (TOKENS, HEADS, WIDTH), (TOKENS, HEADS // 2, WIDTH)
    return {
        "selective_scan": (
            lambda u, dt, a, b, c, d: selective_scan(u, dt, a, b, c, D=d, cu_seqlens=borders)[0],
            [leaf(*wide), leaf(*wide), decay, leaf(*maps), leaf(*maps), leaf(CHANNELS)],
        ),
        "causal_conv1d": (
            lambda x, w, b: causal_conv1d(x, w, b, activation="silu", cu_seqlens=borders)[0],
            [leaf(*wide), leaf(CHANNELS, 4), leaf(CHANNELS)],
        ),
        "gmu_gate": (gmu_gate, [leaf(*wide), leaf(*wide)]),
        "differential_attention": (
            lambda *x: differential_attention(*x, lambda_init=0.5, cu_seqlens_q=borders, window=512),
            [leaf(*heads), leaf(*keys), leaf(*keys), leaf(), leaf(2 * WIDTH)],
        ),
        "linear_cross_entropy": (
            lambda h, w: linear_cross_entropy(h, w, labels),
            [leaf(TOKENS, HEADS * WIDTH), leaf(VOCABULARY, HEADS * WIDTH)],
        ),
    }


def backends(op: str, device: str) -> list[str]:
    """Backends of the op that run on this device, best first."""
    found = []
    for name in BACKENDS:
        os.environ["SAMBAY_KERNELS"] = name
        try:
            if why(op, device).backend == name:
                found.append(name)
        except BackendError:
            continue
    return found


def milliseconds(run: Callable[[], Any], device: str) -> tuple[float, float]:
    """Time by the clock and by the CPU (all threads together), of which the second holds on a busy machine."""
    start, busy = time.perf_counter(), time.process_time()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3, (time.process_time() - busy) * 1e3


def measure(op: str, call: Callable[..., Tensor], leaves: list[Tensor], options: Any) -> list[dict[str, Any]]:
    names = backends(op, options.device)
    forward: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    both: dict[str, list[tuple[float, float]]] = {name: [] for name in names}

    def train() -> None:
        out = call(*leaves)
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    for turn in range(-1, options.rounds):  # the first round warms up
        for name in names:
            os.environ["SAMBAY_KERNELS"] = name
            with torch.no_grad():
                only = milliseconds(lambda: call(*leaves), options.device)
            whole = milliseconds(train, options.device)
            if turn >= 0:
                forward[name].append(only)
                both[name].append(whole)
    best = statistics.median(busy for _, busy in both[names[0]])
    rows = []
    for name in names:
        only, whole = (tuple(map(statistics.median, zip(*x[name], strict=True))) for x in (forward, both))
        rows.append(
            {
                "op": op,
                "backend": name,
                "forward ms": only[0],
                "forward+backward ms": whole[0],
                "CPU ms": whole[1],
                "x of best": whole[1] / best if best else None,
            }
        )
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5, help="measured calls of each backend")
    options.add_argument("--op", help="only this op")
    chosen = options.parse_args()
    prepare(chosen)
    rows: list[dict[str, Any]] = []
    for op, (call, leaves) in cases(chosen.device).items():
        if chosen.op in (None, op):
            rows += measure(op, call, leaves, chosen)
    if not rows:
        raise SystemExit(f"--op {chosen.op}: unknown, choose from {', '.join(cases('cpu'))}")
    title = f"Ops: {TOKENS} tokens in {len(BORDERS) - 1} documents, {CHANNELS} channels, {STATES} states, float32"
    report(title, rows, chosen)


if __name__ == "__main__":
    main()
