"""What each op reaches of its floor, and beside its peers, on the device that is here.

    python kernels/benchmarks/bench_ops.py [--device cuda] [--op selective_scan] [--tokens 32768] [--out FOLDER]

A row is one op, forward or backward, by one backend or peer, at one shape. `floor ms` is the least time the device
needs for the bytes (each input and output once), the exponentials, the float32 operations and the matrix products of
the row, whichever is longest; `of floor` is floor / measured. A CPU has no floor here; backends stand side by side.

With --out the rows go to FOLDER/ops-DEVICE-DATE.json with the device, versions and date.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import inspect
import itertools
import json
import math
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from sambay_kernels import (
    add_layer_norm,
    causal_conv1d,
    differential_attention,
    linear_cross_entropy,
    selective_scan,
    swiglu,
    token_statistics,
)
from sambay_kernels.ops.differential_attention.op import visible_pairs
from sambay_kernels.runtime import dispatch
from torch import Tensor

# Float32 instructions for each token, channel and state. Forward: dt A, (dt u) B, the state, its product with C.
# Backward: the first three again; the state's gradient in and through the step, five products of it, two sums.
SCAN_FLOAT32 = (4, 13)
EXPONENTIALS = (1, 1)  # as many, if the backward could keep those of the forward


@dataclass(frozen=True)
class Device:
    """Ceilings of one device: bytes a second, exponentials, float32 operations and half-precision FLOPs a second."""

    bandwidth: float
    exponentials: float
    float32: float
    tensor: float


def _device(bandwidth: float, tensor: float, processors: int, clock: float, lanes: int) -> Device:
    return Device(bandwidth, processors * 16 * clock, processors * lanes * clock, tensor)


# Vendors' figures; H200's bandwidth and tensor rate as measured on one (copy and large matrix product).
DEVICES = {
    "A100": _device(2.0e12, 312e12, 108, 1.41e9, 64),
    "H100": _device(3.35e12, 790e12, 132, 1.83e9, 128),
    "H200": _device(4.3e12, 790e12, 132, 1.83e9, 128),
}


@dataclass(frozen=True)
class Work:
    """What a computation can't do without."""

    bytes: float
    exponentials: float = 0.0
    float32: float = 0.0
    tensor: float = 0.0

    def floor_ms(self, device: Device | None) -> float | None:
        """The least time on a device; None where its ceilings aren't known."""
        if device is None:
            return None
        return 1e3 * max(
            self.bytes / device.bandwidth,
            self.exponentials / device.exponentials,
            self.float32 / device.float32,
            self.tensor / device.tensor,
        )


@dataclass(frozen=True)
class Case:
    """One op at one shape: its call on leaves that want gradients, the work both ways, and its peers by name."""

    op: str
    shape: str
    call: Callable[..., Tensor | tuple[Tensor, ...]]
    leaves: list[Tensor]
    work: tuple[Work, Work]
    peers: Mapping[str, Callable[..., Tensor | tuple[Tensor, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Shapes:
    """Sizes of the measured calls."""

    tokens: int
    documents: int
    inner: int
    states: int
    hidden: int
    heads: int
    width: int
    intermediate: int
    vocabulary: int
    supervised: int
    dtype: torch.dtype


def shapes_for(device: str, tokens: int | None) -> Shapes:
    """The published model's on a GPU; on CPU those of a small model."""
    if device == "cpu":
        count = tokens or 2048
        return Shapes(count, 3, 512, 16, 256, 4, 64, 1024, 4096, count, torch.float32)
    count = tokens or 32768
    return Shapes(count, 8, 5120, 16, 2560, 40, 64, 10240, 200064, min(count, 8192), torch.bfloat16)


def borders(sizes: Shapes, device: str) -> Tensor:
    """Documents of unequal lengths: shares 1, 2, .. of the row."""
    shares = torch.arange(1, sizes.documents + 1).cumsum(0).double()
    ends = (shares / shares[-1] * sizes.tokens).round().int()
    return torch.cat([torch.zeros(1, dtype=torch.int32), ends]).to(device)


class _Maker:
    """Random leaves of the right type and device."""

    def __init__(self, sizes: Shapes, device: str) -> None:
        self.sizes, self.device = sizes, device
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        made = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return made.to(dtype or self.sizes.dtype).requires_grad_()


def scan_case(sizes: Shapes, device: str, cu_seqlens: Tensor) -> Case:
    make, item = _Maker(sizes, device), torch.finfo(sizes.dtype).bits // 8
    wide, maps, elements = (sizes.tokens, sizes.inner), (sizes.tokens, sizes.states), sizes.tokens * sizes.inner
    decay = -torch.arange(1.0, sizes.states + 1, device=device).repeat(sizes.inner, 1).requires_grad_()
    bias = make(sizes.inner, dtype=torch.float32)
    leaves = [make(*wide), make(*wide, scale=0.1), decay, make(*maps), make(*maps), make(sizes.inner)]
    total = elements * sizes.states

    def call(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return selective_scan(u, delta, A, B, C, D=D, delta_bias=bias, cu_seqlens=cu_seqlens)[0]

    def mamba_ssm(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        """mamba_ssm knows no packing: one document, channels before tokens."""
        fn = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        u, delta, B, C = (x.t()[None].contiguous() for x in (u, delta, B, C))
        return fn(u, delta, A, B[:, None], C[:, None], D.float(), None, bias, True)[0].t()

    work = tuple(
        Work(traffic * elements * item, EXPONENTIALS[way] * total, SCAN_FLOAT32[way] * total)
        for way, traffic in enumerate((3, 5))
    )
    peers = {"mamba_ssm (one document)": mamba_ssm} if _importable("mamba_ssm") and device != "cpu" else {}
    return Case("selective_scan", f"{sizes.tokens} x {sizes.inner} x {sizes.states}", call, leaves, work, peers)  # type: ignore[arg-type]


def conv_case(sizes: Shapes, device: str, cu_seqlens: Tensor) -> Case:
    make, item = _Maker(sizes, device), torch.finfo(sizes.dtype).bits // 8
    elements = sizes.tokens * sizes.inner

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(x, weight, bias, cu_seqlens=cu_seqlens)[0]

    def dao(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        fn = importlib.import_module("causal_conv1d").causal_conv1d_fn
        lengths = cu_seqlens.diff()
        index = torch.repeat_interleave(torch.arange(lengths.numel(), device=device).int(), lengths)[None]
        return fn(x.t()[None], weight, bias, seq_idx=index, activation="silu")[0].t()

    leaves = [make(sizes.tokens, sizes.inner), make(sizes.inner, 4), make(sizes.inner)]
    work = (Work(2 * elements * item, elements), Work(3 * elements * item, elements))
    peers = {"causal-conv1d": dao} if _importable("causal_conv1d") and device != "cpu" else {}
    return Case("causal_conv1d", f"{sizes.tokens} x {sizes.inner} x 4", call, leaves, work, peers)


def swiglu_case(sizes: Shapes, device: str, width: int) -> Case:
    make, item = _Maker(sizes, device), torch.finfo(sizes.dtype).bits // 8
    elements = sizes.tokens * width

    def plain(gate: Tensor, value: Tensor) -> Tensor:
        return torch.nn.functional.silu(gate) * value

    leaves = [make(sizes.tokens, width), make(sizes.tokens, width)]
    work = (Work(3 * elements * item, elements), Work(5 * elements * item, elements))
    peers: dict[str, Callable[..., Tensor]] = {"torch, unfused": plain}
    if device != "cpu":
        peers["torch.compile"] = torch.compile(plain)
    return Case("swiglu", f"{sizes.tokens} x {width}", swiglu, leaves, work, peers)


def norm_case(sizes: Shapes, device: str) -> Case:
    """A float32 residual stream between two products in bfloat16, as autocast makes it."""
    make, elements = _Maker(sizes, device), sizes.tokens * sizes.hidden
    single, half = torch.float32, torch.bfloat16
    leaves = [make(sizes.tokens, sizes.hidden, dtype=dtype) for dtype in (single, half)]
    leaves += [make(sizes.hidden, dtype=single) for _ in range(2)]

    def call(hidden: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return add_layer_norm(hidden, delta, weight, bias, out_dtype=half)

    def plain(hidden: Tensor, delta: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = hidden + delta
        return total, torch.nn.functional.layer_norm(total, weight.shape, weight, bias).to(half)

    peers: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"torch, unfused": plain}
    if device != "cpu":
        peers["torch.compile"] = torch.compile(plain)
    work = Work(12 * elements), Work(16 * elements)
    return Case("add_layer_norm", f"{sizes.tokens} x {sizes.hidden}", call, leaves, work, peers)


def attention_case(sizes: Shapes, device: str, cu_seqlens: Tensor, window: int | None) -> Case:
    make, item, keys = _Maker(sizes, device), torch.finfo(sizes.dtype).bits // 8, sizes.heads // 2
    bounds, longest = cu_seqlens.tolist(), int(cu_seqlens.diff().max())
    leaves = [
        make(sizes.tokens, sizes.heads, sizes.width),
        make(sizes.tokens, keys, sizes.width),
        make(sizes.tokens, keys, sizes.width),
        torch.tensor(0.3, device=device).requires_grad_(),
        make(2 * sizes.width, dtype=torch.float32),
    ]
    products = 2 * sizes.heads * sizes.width * visible_pairs(bounds, bounds, window or 0)
    rows = sizes.tokens * sizes.width * item
    work = (Work((2 * sizes.heads + 2 * keys) * rows, tensor=3 * products),
            Work((4 * sizes.heads + 4 * keys) * rows, tensor=7 * products))  # fmt: skip

    def call(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, weight: Tensor) -> Tensor:
        return differential_attention(
            q, k, v, lam, weight, lambda_init=0.5, cu_seqlens_q=cu_seqlens, window=window, max_length_q=longest,
            max_length_k=longest,
        )  # fmt: skip

    def four_calls(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, weight: Tensor) -> Tensor:
        """As published: each map on each half of the values by FlashAttention, and the rest in plain torch."""
        from torch.nn.attention.varlen import varlen_attn

        limits = (window - 1 if window else -1, 0)
        # torch 2.11 takes grouped heads without being told.
        grouped: Any = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
        maps = []
        for stripe in (0, 1):
            queries, key = q[:, stripe::2].contiguous(), k[:, stripe::2].contiguous()
            halves = [
                varlen_attn(
                    queries, key, v[:, half::2].contiguous(), cu_seqlens, cu_seqlens, longest, longest,
                    window_size=limits, **grouped,
                )
                for half in (0, 1)
            ]  # fmt: skip
            maps.append(torch.cat(halves, -1))  # type: ignore[arg-type]
        out = maps[0] - lam.to(q.dtype) * maps[1]
        wide = out.float()
        out = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight * 0.5).to(q.dtype)
        return out.flatten(1)

    def by_document(q: Tensor, k: Tensor, v: Tensor, lam: Tensor, weight: Tensor) -> Tensor:
        """torch's fused attention, one call for each document and stripe, on heads padded to the values' width."""
        pad, heads, documents = torch.nn.functional.pad, sizes.heads // 2, []
        for start, stop in itertools.pairwise(bounds):
            behind = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
            mask = (behind >= 0) & (behind < window) if window else None
            values = v[start:stop].unflatten(1, (-1, 2)).flatten(2).transpose(0, 1).repeat_interleave(2, 0)
            maps = [
                torch.nn.functional.scaled_dot_product_attention(
                    pad(q[start:stop, stripe::2].transpose(0, 1), (0, sizes.width))[None],
                    pad(k[start:stop, stripe::2].transpose(0, 1), (0, sizes.width)).repeat_interleave(2, 0)[None],
                    values[None], attn_mask=mask, is_causal=mask is None, scale=sizes.width**-0.5,
                )[0]
                for stripe in (0, 1)
            ]  # fmt: skip
            documents.append((maps[0] - lam * maps[1]).transpose(0, 1).reshape(-1, heads, 2 * sizes.width))
        wide = torch.cat(documents).float()
        out = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5) * weight * 0.5
        return out.to(q.dtype).flatten(1)

    peers = (
        {"torch's fused, by document": by_document} if device == "cpu" else {"four FlashAttention calls": four_calls}
    )
    name = f"{sizes.tokens} x {sizes.heads} x {sizes.width}, {'window ' + str(window) if window else 'full'}"
    return Case("differential_attention", name, call, leaves, work, peers)


def loss_case(sizes: Shapes, device: str) -> Case:
    make = _Maker(sizes, device)
    labels = torch.randint(0, sizes.vocabulary, (sizes.supervised,), generator=make.generator, device=device)
    leaves = [make(sizes.supervised, sizes.hidden), make(sizes.vocabulary, sizes.hidden, scale=0.02)]
    product = 2.0 * sizes.supervised * sizes.hidden * sizes.vocabulary
    weight = leaves[1].numel() * leaves[1].element_size()
    logits = sizes.supervised * sizes.vocabulary

    def call(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels)

    work = (Work(weight, logits, tensor=product), Work(2 * weight, logits, tensor=2 * product))

    def watched(hidden: Tensor, weight: Tensor) -> Tensor:
        with token_statistics():
            return call(hidden, weight)

    teacher: dict[str, Any] = {"distill_weight": 0.5, "teacher_ids": labels[:, None] + torch.arange(64, device=device)}
    teacher["teacher_ids"] %= sizes.vocabulary
    teacher["teacher_logprobs"] = torch.full((sizes.supervised, 64), -5.0, device=device)
    peers: dict[str, Callable[..., Tensor]] = {
        "with accuracy and entropy": watched,
        "dft": lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, loss_type="dft"),
        "a teacher's 64": lambda hidden, weight: linear_cross_entropy(hidden, weight, labels, **teacher),
    }
    if _importable("liger_kernel") and device != "cpu":
        module = importlib.import_module("liger_kernel.transformers.functional")
        peers["Liger"] = lambda hidden, weight: module.liger_fused_linear_cross_entropy(
            hidden, weight, labels, reduction="sum"
        )
    return Case("linear_cross_entropy", f"{sizes.supervised} x {sizes.vocabulary}", call, leaves, work, peers)


def cases(sizes: Shapes, device: str, wanted: str | None) -> Iterator[Case]:
    """The cases of one op, or of all, each made when its turn comes."""
    cu_seqlens = borders(sizes, device)
    makers: list[tuple[str, Callable[[], Case]]] = [
        ("selective_scan", lambda: scan_case(sizes, device, cu_seqlens)),
        ("causal_conv1d", lambda: conv_case(sizes, device, cu_seqlens)),
        ("swiglu", lambda: swiglu_case(sizes, device, sizes.inner)),
        ("swiglu", lambda: swiglu_case(sizes, device, sizes.intermediate)),
        ("add_layer_norm", lambda: norm_case(sizes, device)),
        ("differential_attention", lambda: attention_case(sizes, device, cu_seqlens, 512)),
        ("differential_attention", lambda: attention_case(sizes, device, cu_seqlens, None)),
        ("linear_cross_entropy", lambda: loss_case(sizes, device)),
    ]
    names = sorted({name for name, _ in makers})
    if wanted is not None and wanted not in names:
        raise SystemExit(f"--op {wanted}: unknown, choose from {', '.join(names)}")
    for name, make in makers:
        if wanted in (None, name):
            yield make()


RECURRENCES = ("selective_scan", "causal_conv1d")


def _importable(module: str) -> bool:
    try:
        importlib.import_module(module)
    except Exception:  # a broken CUDA extension raises whatever it likes
        return False
    return True


@contextmanager
def _backend(name: str) -> Iterator[None]:
    before = os.environ.get(dispatch.ENVIRONMENT)
    os.environ[dispatch.ENVIRONMENT] = name
    try:
        yield
    finally:
        if before is None:
            del os.environ[dispatch.ENVIRONMENT]
        else:
            os.environ[dispatch.ENVIRONMENT] = before


def backends(op: str, device: str) -> list[str]:
    """Backends of an op that run on this device, best first; on a GPU without the recurrences in plain torch, which
    take minutes at its size."""
    found, slow = [], {"reference", "torch"} if op in RECURRENCES else {"reference"}
    for name in dispatch.CHOICES[1:]:
        if name in slow and device != "cpu":
            continue
        with _backend(name):
            try:
                if dispatch.why(op, device).backend == name:
                    found.append(name)
            except dispatch.BackendError:
                continue
    best = dispatch.why(op, device).backend
    return sorted(found, key=lambda name: name != best)


class Clock:
    """Times calls: by events on a GPU, after emptying its second-level cache; by the clock on CPU."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.flush = None if device == "cpu" else torch.empty(256 << 20, dtype=torch.int8, device=device)

    def ms(self, run: Callable[[], Any]) -> float:
        if self.flush is None:
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)


def measure(case: Case, device: str, ceilings: Device | None, rounds: int) -> list[dict[str, Any]]:
    """Every backend and peer of a case in turns, round after round: medians of forward and backward."""
    clock = Clock(device)
    names = [*backends(case.op, device), *case.peers]
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in names}
    for turn in range(-2, rounds):
        for name in names:
            call, chosen = case.peers.get(name, case.call), "auto" if name in case.peers else name
            with _backend(chosen):
                made: list[Any] = []
                forward = clock.ms(lambda made=made, call=call: made.append(call(*case.leaves)))  # type: ignore[misc]
                outs = made[0] if isinstance(made[0], tuple) else (made[0],)
                ups = [torch.ones_like(out) for out in outs]
                backward = clock.ms(lambda outs=outs, ups=ups: torch.autograd.grad(outs, case.leaves, ups))  # type: ignore[misc]
            if turn >= 0:
                times[name][0].append(forward)
                times[name][1].append(backward)
    rows = []
    for way, direction in enumerate(("forward", "backward")):
        floor = case.work[way].floor_ms(ceilings)
        base = statistics.median(times[names[0]][way])
        for name in names:
            found = statistics.median(times[name][way])
            rows.append(
                {
                    "op": case.op,
                    "shape": case.shape,
                    "pass": direction,
                    "by": name,
                    "ms": round(found, 3),
                    "MB": round(case.work[way].bytes / 1e6, 1),
                    "floor ms": None if floor is None else round(floor, 3),
                    "of floor": None if floor is None else round(floor / found, 3),
                    "times first": round(found / base, 2),
                }
            )
    return rows


def machine(device: str) -> dict[str, Any]:
    """Where and with what this was measured."""
    versions: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "flash_attn", "mamba_ssm", "causal_conv1d", "liger_kernel"):
        if _importable(name):
            versions[name] = getattr(importlib.import_module(name), "__version__", "unknown")
    kind = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        kind = next(iter(re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())), kind)
    return {
        "device": kind if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **versions,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned text."""
    columns = list(rows[0])
    cells = [columns, *[["-" if row[c] is None else str(row[c]) for c in columns] for row in rows]]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    left = {columns.index(c) for c in ("op", "shape", "pass", "by")}
    return "\n".join(
        "  ".join(x.ljust(w) if i in left else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    )


def save(folder: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write rows and machine to a file named after both; whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    path = folder / f"ops-{device}-{facts['date']}.json"
    part = path.with_suffix(".part")
    with open(part, "w") as file:
        json.dump({"machine": facts, "rows": rows}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    return path


def main() -> int:
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    options.add_argument("--op", help="only this op")
    options.add_argument("--tokens", type=int, help="packed tokens (32,768 on a GPU, 2,048 on CPU)")
    options.add_argument("--rounds", type=int, help="measured rounds (20 on a GPU, 5 on CPU)")
    options.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's own choice")
    options.add_argument("--out", type=Path, help="folder for the results as JSON")
    chosen = options.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(f"--device {chosen.device}: torch sees no CUDA device here")
    facts = machine(chosen.device)
    ceilings = next((value for name, value in DEVICES.items() if name in facts["device"]), None)
    sizes = shapes_for(chosen.device, chosen.tokens)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    rows: list[dict[str, Any]] = []
    for case in cases(sizes, chosen.device, chosen.op):
        found = measure(case, chosen.device, ceilings, chosen.rounds or (5 if chosen.device == "cpu" else 20))
        print(table(found) + "\n", flush=True)
        rows += found
    if chosen.out:
        print(f"written: {save(chosen.out, facts, rows)}")
    return 0 if rows and all(math.isfinite(row["ms"]) for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
