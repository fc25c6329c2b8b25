"""Peak memory of the loss for 8,192 supervised tokens at a vocabulary of 200,064, beside full float32 logits.

Each row is a fresh process: inputs are made, the high-water mark is reset, then loss and gradients are computed. What
counts is everything above the inputs, the returned gradients of hidden states and weight included. The full logits are
counted alone, without their softmax or gradient; the last row is what torch's own cross entropy really takes, at a
sixteenth of the tokens. Fails when the loss takes a tenth of the full logits or more.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machine import parser, prepare, report
from sambay_kernels import linear_cross_entropy

VOCABULARY, TOKENS = 200_064, 8192
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def peak_above_inputs(case: str, hidden_size: int, device: str) -> dict[str, float]:
    """Run one case here and return its peak in bytes above the inputs, and its seconds."""
    tokens = TOKENS // 16 if case == "torch" else TOKENS
    dtype = torch.bfloat16 if case == "bfloat16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, device=device, dtype=dtype, requires_grad=True)
    weight = (torch.randn(VOCABULARY, hidden_size, device=device) * 0.02).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCABULARY, (tokens,), device=device)
    reduction = "none" if case == "by token" else "sum"
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        CLEAR.write_text("5")  # sets the high-water mark back to the present size
        before = memory("VmRSS")
    start = time.perf_counter()
    if case == "torch":
        loss = F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")
    else:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).sum()
    loss.backward()
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() if device.startswith("cuda") else memory("VmHWM")
    return {"peak": peak - before, "seconds": seconds, "tokens": tokens}


def fresh(case: str, hidden_size: int, options: Any) -> dict[str, float]:
    """`peak_above_inputs` in a process of its own."""
    command = [sys.executable, __file__, "--case", case, "--hidden", str(hidden_size), "--device", options.device]
    command = [*command, "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1] if done.stderr else done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--hidden", type=int, default=64, help="hidden size H")
    options.add_argument("--case", choices=("float32", "bfloat16", "by token", "torch"), help=argparse.SUPPRESS)
    chosen = options.parse_args()
    prepare(chosen)
    if chosen.case:
        print(json.dumps(peak_above_inputs(chosen.case, chosen.hidden, chosen.device)))
        return
    if not chosen.device.startswith("cuda") and not CLEAR.exists():
        raise SystemExit("measuring on CPU needs Linux: /proc/self/clear_refs resets a process's high-water mark")
    full = 4 * TOKENS * VOCABULARY
    names = {
        "float32": "ours, float32, sum",
        "by token": "ours, float32, loss by token",
        "bfloat16": "ours, bfloat16, sum",
        "torch": "torch cross_entropy, float32",
    }
    rows: list[dict[str, Any]] = []
    for case, name in names.items():
        found = fresh(case, chosen.hidden, chosen)
        logits = full * found["tokens"] / TOKENS
        rows.append(
            {
                "loss": name,
                "tokens": int(found["tokens"]),
                "full float32 logits MB": logits / 1e6,
                "peak MB": found["peak"] / 1e6,
                "of the logits": found["peak"] / logits,
                "seconds": found["seconds"],
            }
        )
    title = f"Memory of the loss: vocabulary {VOCABULARY:,}, hidden size {chosen.hidden}, forward and backward"
    report(title, rows, chosen)
    worst = max(row["of the logits"] for row in rows[:3])
    if worst >= 0.1:
        raise SystemExit(f"the loss takes {worst:.3f} of the full logits, a tenth or more")
    print(f"under a tenth of the full logits: {worst:.3f} at most")


if __name__ == "__main__":
    main()
