"""What ranks of one machine hold after loading a checkpoint: `loading_worker.py FOLDER OUT`; MiB by case, as JSON."""

from __future__ import annotations

import gc
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

CPU = "cpu"
SETTINGS = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def memory(*names: str) -> float:
    """MiB of these lines of the kernel's account (proc(5): a page that n processes map counts 1/n in Pss)."""
    lines = dict(line.split()[:2] for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return sum(int(lines[f"{name}:"]) for name in names) / 1024


@contextmanager
def most_of_its_own() -> Iterator[list[float]]:
    """The most anonymous memory while active, above what there was before."""
    before, over = memory("Pss_Anon"), threading.Event()
    most = [0.0]

    def watch() -> None:
        while not over.wait(0.01):
            most[0] = max(most[0], memory("Pss_Anon") - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join(10)


def widened(folder: str) -> Any:
    import torch

    from sft.models.load import load_checkpoint
    from sft.models.widen import HELD, widened

    return widened(load_checkpoint(folder, dtype=HELD), torch.device(CPU))


def each_for_itself(folder: str) -> Any:
    from sft.models.load import load_checkpoint

    return load_checkpoint(folder, dtype="float32")


def sharded(folder: str) -> Any:
    import torch

    from sft.models.load import load_checkpoint
    from sft.models.widen import HELD
    from sft.train.sharded import shard

    model = load_checkpoint(folder, dtype=HELD)
    config = SimpleNamespace(config=SETTINGS)
    shard(model, SimpleNamespace(hf_deepspeed_config=config, device=torch.device(CPU)))
    return model


def held(load: Callable[[str], Any], folder: str) -> dict[str, Any]:
    """What a model that is loaded, and read, takes of memory here, while all have it."""
    import torch

    from sft.utils.distributed import barrier, rank

    gc.collect()
    barrier()
    before = memory("Pss")
    barrier()
    with most_of_its_own() as most:
        model = load(folder)
    total = sum(parameter.detach().sum(dtype=torch.float64).item() for parameter in model.parameters())
    barrier()
    found = {"pss": memory("Pss") - before, "own": most[0], "sum": total}
    found["types"] = sorted({str(parameter.dtype) for parameter in model.parameters()})
    barrier()
    if rank() == 0 and load is widened:
        with torch.no_grad():
            next(model.parameters()).fill_(7.0)
    barrier()
    found["first"] = next(model.parameters()).flatten()[:1].tolist()
    barrier()
    return found


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    import transformers  # noqa: F401  (imported before anything is measured)

    import sft.train.sharded  # noqa: F401
    from sft.train.engine import start_engine
    from sft.utils.distributed import rank

    start_engine(SETTINGS, on_gpu=False)
    results = {}
    for load in (widened, each_for_itself, sharded):
        for dtype in ("float32", "bfloat16"):
            held(load, str(folder / "small")) if dtype == "float32" else None  # what a first call leaves
            results[f"{load.__name__}-{dtype}"] = held(load, str(folder / dtype))
    (out / f"{rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
