"""Training steps of the published size with random weights, on a GPU, beside a transformer of that size.

    python kernels/benchmarks/published_step.py --device cuda [--tokens 32768] [--documents 8 1] [--out FILE]

bfloat16 weights, one packed row of equal documents, every layer checkpointed, fused AdamW. Prints tokens per second
(median of the measured steps), the peak of allocated memory, and the kernels that take most of a step.

The transformer has Phi-4-mini's shape (3.84 billion parameters) and is run by transformers with torch's FlashAttention,
the documents as rows of a batch, and with Liger's kernels, without which its logits alone would take 26 GB. It is left
out where Liger isn't installed.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from machine import parser, prepare, report
from sambay_kernels import why
from transformers import Phi3Config, Phi3ForCausalLM, PreTrainedModel

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM
from sft.models.sized import PHI_4_MINI

OPS = ("selective_scan", "causal_conv1d", "swiglu", "differential_attention", "linear_cross_entropy")


def trainable(model: PreTrainedModel) -> PreTrainedModel:
    """In bfloat16, but for what the published checkpoint has in float32; every layer checkpointed."""
    torch.nn.Module.to(model, torch.bfloat16)
    for name, parameter in model.named_parameters():
        if name.endswith("A_log") or ".lambda_" in name:
            parameter.data = parameter.data.float()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def sambay(device: str) -> PreTrainedModel:
    """The default configuration is the published one."""
    torch.manual_seed(0)
    with torch.device(device):
        return trainable(Phi4FlashForCausalLM(Phi4FlashConfig()))


def phi_4_mini(device: str) -> PreTrainedModel:
    """Liger's kernels take the place of transformers' (norm, gate, rotary positions, linear cross entropy)."""
    importlib.import_module("liger_kernel.transformers").apply_liger_kernel_to_phi3()
    torch.manual_seed(0)
    with torch.device(device):
        return trainable(Phi3ForCausalLM(Phi3Config(**PHI_4_MINI, use_cache=False)))


def rows(tokens: int, documents: int, device: str) -> dict[str, torch.Tensor]:
    """Equal documents as rows of a batch; a fifth of each is prompt."""
    length = tokens // documents
    ids = torch.randint(0, 200000, (documents, length), device=device)
    labels = ids.clone()
    labels[:, : length // 5] = -100
    return {"input_ids": ids, "labels": labels}


def packed(tokens: int, documents: int, device: str) -> dict[str, torch.Tensor | int]:
    """The same documents in one row."""
    length = tokens // documents
    borders = torch.arange(0, tokens + 1, length, dtype=torch.int32, device=device)
    one_row = {name: value.view(1, -1) for name, value in rows(tokens, documents, device).items()}
    return {
        **one_row,
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": length,
        "max_length_k": length,
    }


def stepper(model: PreTrainedModel) -> Callable[[dict[str, Any]], float]:
    """A function that does one training step and returns its seconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def step(inputs: dict[str, Any]) -> float:
        start = time.perf_counter()
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def measure(name: str, model: PreTrainedModel, inputs: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of documents; then one step's kernels are printed."""
    step, found = stepper(model), []
    for documents in options.documents:
        given = inputs(options.tokens, documents, options.device)
        first = step(given)  # compiles the kernels
        torch.cuda.reset_peak_memory_stats()
        seconds = statistics.median(step(given) for _ in range(options.rounds))
        found.append(
            {
                "model": name,
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "tokens": options.tokens,
                "documents": documents,
                "first step s": first,
                "step s": seconds,
                "tokens/s": options.tokens / seconds,
                "peak GB": torch.cuda.max_memory_allocated() / 1e9,
            }
        )
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step(inputs(options.tokens, options.documents[0], options.device))
    print(name)
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=30, max_name_column_width=70))
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tokens", type=int, default=32768, help="in a step")
    options.add_argument("--documents", type=int, nargs="+", default=[8, 1], help="equal documents of these tokens")
    options.add_argument("--rounds", type=int, default=3, help="measured steps")
    chosen = options.parse_args()
    prepare(chosen)
    if not chosen.device.startswith("cuda"):
        raise SystemExit("published_step.py: a model of 3.85 billion parameters needs --device cuda")
    found = measure("SambaY", sambay(chosen.device), packed, chosen)
    gc.collect()
    torch.cuda.empty_cache()
    note = "backends: " + ", ".join(f"{op} {why(op, 'cuda').backend}" for op in OPS)
    if importlib.util.find_spec("liger_kernel"):
        found += measure("Phi-4-mini's shape, Liger", phi_4_mini(chosen.device), rows, chosen)
    else:
        note += "; no transformer beside it: pip install liger-kernel"
    report("Training step of the published size", found, chosen, note)


if __name__ == "__main__":
    main()
