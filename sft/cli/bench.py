"""`sft bench generate`: how fast a model answers, beside transformers' `generate` and a transformer of its size."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.cli.common import check_model, console, file_path, positive, seed
from sft.utils.errors import UsageError, shown

if TYPE_CHECKING:
    from sft.generate.bench.rows import Row
    from sft.generate.bench.run import Bench, Found

TAKES_OVERRIDES = False
NAMES = ("tiny", "small", "published")
PRESETS = ("short", "long-answer", "long-prompt", "long-both", "uneven")
BESIDE = ("llama", "own-generate", "llama-graph", "none")
SWEEP = tuple(1024 << power for power in range(6))
_OF_OUTPUT = ("debug", "json", "told", "words", "out", "figure")
MOST_GROWTH, LEAST_STRAIGHT = 1.3, 0.99
EPILOG = """workloads (requests x (tokens of the prompt + of the answer)):
  short        16 x (128 + 256)          long-both    8 x (2,048 + 2,048)
  long-answer   1 x (512 + 1,024)        uneven       64, each of 32 to 2,048 + 32 to 2,048
  long-prompt   1 x (4,096 + 64)
sides: the engine; own-generate, the same model through transformers' `generate`; llama, a transformer of as many
parameters through `generate` (Phi-4-mini's shape beside the published one); llama-graph, its steps in a CUDA graph.
Greedy, no answer ends early; sides take turns, and the fastest round of each counts. At the end: a token's time in the
last quarter of an answer, over that in the first (of steps: over that at the shortest length). Memory: the peak of the
process or GPU over what the models take."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, of which model, beside what."""
    parser.epilog = EPILOG
    parser.add_argument("what", choices=("generate",), help="what is measured: answers being made")
    of = parser.add_mutually_exclusive_group()
    of.add_argument("--model", metavar="PATH", help="a model or adapter folder, or Hub id")
    text = f"random weights: {', '.join(NAMES)} or a number of parameters such as 50M (default: small, 9.6M)"
    of.add_argument("--size", type=_size, default="small", help=text)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--workload", nargs="+", choices=PRESETS, metavar="NAME", help="as below")
    text = "paper: a prompt of 2,048 and 32,768 new tokens (arXiv 2507.06607), by steps measured on the way"
    which.add_argument("--protocol", choices=("paper",), help=text)
    text = "time per token and of prompts by length (--prompt; 1,024 to 32,768), with what a straight line makes of it"
    which.add_argument("--sweep", action="store_true", help=text)
    number: dict[str, Any] = {"type": positive, "nargs": "+", "metavar": "N"}
    parser.add_argument("--prompt", **number, help="tokens of a prompt (128); several: each with each of the others")
    parser.add_argument("--new", **number, help="tokens of an answer (256)")
    parser.add_argument("--requests", **number, help="at once (16; with --protocol or --sweep 1)")
    text = "(llama own-generate; with uneven own-generate; with --protocol llama; with --sweep none)"
    parser.add_argument("--beside", nargs="+", choices=BESIDE, metavar="SIDE", help=f"{', '.join(BESIDE)} {text}")
    parser.add_argument("--device", type=_device, help="cpu or cuda (default: cuda where there is one)")
    text = "of all sides (default: float32 on a CPU, else bfloat16)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=text)
    parser.add_argument("--threads", type=positive, metavar="N", help="of a CPU (default: torch's choice)")
    parser.add_argument("--rounds", type=positive, default=3, metavar="N", help="the fastest counts (3)")
    parser.add_argument("--seed", type=seed, default=0, help="of the prompts")
    parser.add_argument("--out", type=file_path, metavar="FILE", help="write the JSON here, too")
    parser.add_argument("--figure", type=file_path, metavar="FILE", help="draw it here: an SVG")


def _size(text: str) -> str | int:
    if text in NAMES:
        return text
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([KMB]?)", text.strip().upper().replace(",", ""))
    if not found:
        kinds = f"{', '.join(NAMES)}, or parameters such as 7500000, 50M or 1.5B"
        raise argparse.ArgumentTypeError(f"{shown(text[:60])} is none of {kinds}")
    return round(float(found[1]) * {"": 1, "K": 1e3, "M": 1e6, "B": 1e9}[found[2]])


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:N, not {shown(text[:60])}")
    return text


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Measure, print, write."""
    beside = _beside(arguments)
    if arguments.model is not None:
        check_model(arguments.model)
    from sft.utils.files import atomic_open
    from sft.utils.quiet import quiet_libraries

    for name in ("out", "figure"):
        if (path := getattr(arguments, name)) and (why := _no_file(path)):
            raise UsageError(f"--{name} {shown(path)} can't be written: {why}")
    quiet_libraries(debug=arguments.debug)
    bench = _bench(arguments, beside)
    found = _measured(bench, arguments)
    arguments.told.update(_as_json(bench, found, arguments))
    _show(bench, found)
    told = json.dumps(arguments.told, indent=2, allow_nan=False)
    for path, text in ((arguments.out, lambda: told + "\n"), (arguments.figure, lambda: _figure(found.rows))):
        if path:
            with atomic_open(path) as handle:
                handle.write(text())
    return 0


def _no_file(path: str) -> str | None:
    from sft.utils.files import unwritable

    return "it is a folder" if Path(path).is_dir() else unwritable(Path(path).parent)


def _beside(arguments: argparse.Namespace) -> list[str]:
    """The other sides. Raises UsageError for what doesn't go together."""
    lengths = arguments.protocol or arguments.sweep
    named = arguments.beside or _default_sides(arguments)
    if "none" in named and len(named) > 1:
        raise UsageError("--beside none can't stand with other sides")
    if "llama-graph" in named and not lengths:
        raise UsageError("--beside llama-graph measures steps: say --protocol paper or --sweep")
    given = [name for name in ("prompt", "new", "requests") if getattr(arguments, name)]
    if arguments.workload and given:
        raise UsageError(f"--{given[0]} and --workload both say how long answers are: leave one out")
    if arguments.sweep and "new" in given:
        raise UsageError("--new has no effect with --sweep, whose lengths are those of --prompt")
    if arguments.protocol and any(len(getattr(arguments, name) or ()) > 1 for name in ("prompt", "new")):
        raise UsageError("--protocol paper takes one --prompt and one --new")
    return [] if named == ["none"] else list(dict.fromkeys(named))


def _default_sides(arguments: argparse.Namespace) -> list[str]:
    """Those that an hour isn't needed for."""
    if arguments.sweep:
        return ["none"]
    if arguments.protocol:
        return ["llama"]
    return ["own-generate"] if "uneven" in (arguments.workload or ()) else ["llama", "own-generate"]


def _bench(arguments: argparse.Namespace, beside: Sequence[str]) -> Bench:
    """The models, where they are asked to be."""
    import torch

    from sft.generate.bench.run import Bench
    from sft.models.sized import random_sambay, shape_of
    from sft.utils.progress import ProgressLine

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and int(device.partition(":")[2] or 0) >= torch.cuda.device_count():
        raise UsageError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here")
    if device == "cpu" and "llama-graph" in beside:
        raise UsageError("--beside llama-graph needs a CUDA device")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.model is None:
        shape = shape_of(arguments.size)
        with torch.device(device):
            model: Any = random_sambay(shape)
    else:
        from sft.run.named import load_named

        model, _ = load_named(arguments.model)
    dtype = getattr(torch, arguments.dtype or ("float32" if device == "cpu" else "bfloat16"))
    tick = ProgressLine("bench", "runs", passing=True)
    return Bench(model, beside, device=device, dtype=dtype, rounds=arguments.rounds, tick=tick)


def _measured(bench: Bench, arguments: argparse.Namespace) -> Found:
    from sft.generate.bench.workloads import WORKLOADS, grid

    if arguments.protocol:
        (prompt,), (new,) = arguments.prompt or [2048], arguments.new or [32768]
        return bench.paper(arguments.requests or [1], prompt, new)
    if arguments.sweep:
        return bench.sweep(arguments.requests or [1], arguments.prompt or SWEEP)
    if arguments.workload:
        return bench.answers([WORKLOADS[name] for name in dict.fromkeys(arguments.workload)], arguments.seed)
    works = grid(arguments.requests or [16], arguments.prompt or [128], arguments.new or [256])
    return bench.answers(works, arguments.seed)


def _as_json(bench: Bench, found: Found, arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from sft.utils.environment import environment
    from sft.utils.processor import processor_name

    return {
        "settings": {name: value for name, value in vars(arguments).items() if name not in _OF_OUTPUT},
        "machine": {
            **environment(),
            "processor": processor_name(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
        },
        "device": str(bench.device),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "parameters": bench.parameters,
        "rows": [asdict(row) for row in found.rows],
        "fits": [asdict(fit) for fit in found.fits],
    }


def _figure(rows: Sequence[Row]) -> str:
    from sft.report.bench import draw_bench
    from sft.report.drawing import as_svg, drawing

    with drawing():
        return as_svg(draw_bench(rows))


# ---- the terminal ----

_COLUMNS = {
    "tokens/s": lambda row: row.tokens_per_second and f"{row.tokens_per_second:,.0f}",
    "engine is": lambda row: row.times and f"{row.times:.2f} x",
    "first token, ms": lambda row: row.first_token and f"{1e3 * row.first_token:,.1f}",
    "ms a token": lambda row: row.token and f"{1e3 * row.token:,.2f}",
    "at the end": lambda row: row.growth and f"{row.growth:.2f} x",
    "memory, MB": lambda row: row.memory and f"{row.memory / 1e6:,.0f}",
    "of bandwidth": lambda row: row.bandwidth and f"{row.bandwidth:.0%}",
    "seconds": lambda row: row.seconds and f"{row.seconds:,.2f}",
}


def _show(bench: Bench, found: Found) -> None:
    from sft.utils.tables import numbers_table

    out = console()
    cells = [[text(row) or "" for text in _COLUMNS.values()] for row in found.rows]
    kept = [place for place in range(len(_COLUMNS)) if any(line[place] for line in cells)]
    head = ["", "side", *(name for place, name in enumerate(_COLUMNS) if place in kept)]
    rows = [
        [row.what, f"{row.side}: no memory" if row.full else row.side, *(line[place] for place in kept)]
        for row, line in zip(found.rows, cells, strict=True)
    ]
    print(_title(bench))
    text = {"": 12, "side": 12}
    optional = ("seconds", "at the end", "memory, MB", "first token, ms")
    out.print(numbers_table(head, rows, text=text, optional=[x for x in optional if x in head], width=out.width))
    for line in _told(found):
        print(line)


def _title(bench: Bench) -> str:
    import torch

    from sft.utils.processor import processor_name

    sizes = ", ".join(f"{side} {count / 1e6:,.1f}M" for side, count in bench.parameters.items())
    where = f"{processor_name()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f} of {os.cpu_count()}"
    if bench.device.type == "cuda":
        where = torch.cuda.get_device_name(bench.device)
    return f"parameters: {sizes}; {str(bench.dtype).removeprefix('torch.')}; {where}"


def _told(found: Found) -> list[str]:
    """How times grow with the length, and whether as is claimed."""
    from sft.generate.bench.rows import INNER

    lines = []
    for fit in found.fits:
        inner = fit.side == INNER
        claim = f" ({_holds(fit.tokens <= MOST_GROWTH)}: at most {MOST_GROWTH})" if inner else ""
        who = "engine, outside full attention" if inner else fit.side
        lines.append(f"{who}, {fit.requests} at once: a token at the longest takes {fit.tokens:.2f} x{claim}")
    for side, straight in {fit.side: fit.prefill for fit in found.fits if fit.prefill is not None}.items():
        claim = f" ({_holds(straight > LEAST_STRAIGHT)}: above {LEAST_STRAIGHT})" if side == "engine" else ""
        lines.append(f"{side}, time of prompts by length: R^2 of a straight line {straight:.4f}{claim}")
    return lines


def _holds(right: bool) -> str:
    return "holds" if right else "doesn't hold"
