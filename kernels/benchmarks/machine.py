"""What a benchmark says about where it ran, and how it prints and stores its rows."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def parser(description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options.add_argument("--threads", type=int, default=0, help="CPU threads; 0 (default): torch's own choice")
    options.add_argument("--out", type=Path, help="also write the rows and the machine to this JSON file")
    return options


def prepare(options: argparse.Namespace) -> None:
    """Set threads, check the device."""
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: torch sees no CUDA device here")


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, load, threads and versions: figures mean little without them."""
    import transformers

    from sft.utils.processor import processor_name

    return {
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(title: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace, note: str = "") -> None:
    """Print the machine and a table of the rows, and write both to --out."""
    facts = machine(options.device)
    columns = list(rows[0])
    cells = [[_text(row[c]) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in [columns, *cells]) for i in range(len(columns))]
    print(title)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    for line in [columns, *cells]:
        padded = (x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        print("  " + "  ".join(padded).rstrip())
    if note:
        print(note)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"title": title, "machine": facts, "rows": list(rows), "note": note}
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)
