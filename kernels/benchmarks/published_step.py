"""One training step of a model of the published size with random weights, on a GPU: speed, memory, and time by kernel.

bfloat16 weights, one packed row, every layer checkpointed, AdamW. Prints tokens per second (median of the measured
steps), the peak of allocated memory, and the kernels that take most of one step.
"""

from __future__ import annotations

import statistics
import time

import torch
from machine import parser, prepare, report
from sambay_kernels import why

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

OPS = ("selective_scan", "causal_conv1d", "swiglu", "differential_attention", "linear_cross_entropy")


def published(device: str) -> Phi4FlashForCausalLM:
    """The default configuration is the published one."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Phi4FlashForCausalLM(Phi4FlashConfig())
    torch.nn.Module.to(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log") or ".lambda_" in name:
            parameter.data = parameter.data.float()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def batch(tokens: int, documents: int, device: str) -> dict[str, torch.Tensor | int]:
    """A packed row of equal documents; a fifth of each is prompt."""
    length = tokens // documents
    ids = torch.randint(0, 200000, (1, tokens), device=device)
    labels = ids.clone().view(documents, length)
    labels[:, : length // 5] = -100
    borders = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    return {
        "input_ids": ids,
        "labels": labels.view(1, tokens),
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": length,
        "max_length_k": length,
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=32768, help="length of the packed row")
    options.add_argument("--documents", type=int, default=8, help="equal documents in it")
    options.add_argument("--rounds", type=int, default=3, help="measured steps")
    chosen = options.parse_args()
    prepare(chosen)
    if not chosen.device.startswith("cuda"):
        raise SystemExit("published_step.py: a model of 3.85 billion parameters needs --device cuda")
    model, inputs = published(chosen.device), batch(chosen.tokens, chosen.documents, chosen.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step() -> float:
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first = step()  # compiles the kernels
    torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(step() for _ in range(chosen.rounds))
    row = {
        "tokens": chosen.tokens,
        "documents": chosen.documents,
        "first step s": first,
        "step s": seconds,
        "tokens/s": chosen.tokens / seconds,
        "peak GB": torch.cuda.max_memory_allocated() / 1e9,
    }
    backends = ", ".join(f"{op} {why(op, 'cuda').backend}" for op in OPS)
    report("Training step of the published size", [row], chosen, f"backends: {backends}")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70))


if __name__ == "__main__":
    main()
