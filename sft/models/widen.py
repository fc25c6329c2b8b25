"""float32 masters of a checkpoint that is stored narrower, without a copy of them for each process of a machine.

A checkpoint that is loaded in the type that it is stored in stays mapped from its file, and all processes of a machine
share the file's pages. Widened, each process would have its own: so a GPU gets a tensor at a time, and on a CPU the
first process of a machine widens for all, into memory that the others map.
"""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.models.checkpoint import check_safetensors
from sft.models.merge import FinalTensor
from sft.models.save import STORED_TYPES, write_safetensors
from sft.utils.distributed import beside, gather, together

HELD = "held"
"""In place of a type's name: what the checkpoint is stored in, where that loads without rounding anything."""


def stored_dtype(name_or_path: str, revision: str | None = None) -> str:
    """The type of a checkpoint's floating tensors, where all have the same one and its files are here; else float32,
    which holds all that is stored exactly."""
    folder = _folder(name_or_path, revision)
    files = sorted(folder.glob("*.safetensors")) if folder else []
    found = {entry["dtype"] for path in files for entry in check_safetensors(path).values()}
    types = {STORED_TYPES[name] for name in found if name in STORED_TYPES and STORED_TYPES[name].is_floating_point}
    if len(types) != 1 or not found <= STORED_TYPES.keys():
        return "float32"
    return str(types.pop()).removeprefix("torch.")


def _folder(name_or_path: str, revision: str | None) -> Path | None:
    """Where a checkpoint's files lie; None for one that isn't here yet."""
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import try_to_load_from_cache

    kept = try_to_load_from_cache(name_or_path, "config.json", revision=revision)
    return Path(kept).parent if isinstance(kept, str) else None


def widened(model: Any, device: torch.device, *, by_itself: bool = False) -> Any:
    """`model` with all floating tensors in float32, on a GPU where `device` is one.

    `by_itself`: this process widens for itself. Otherwise all processes of the run have to call this together.
    """
    if device.type != "cpu":
        for _, tensor in _floating(model):
            tensor.data = tensor.data.to(device, torch.float32)
        return model.to(device)
    narrow = {name: tensor for name, tensor in _floating(model) if tensor.dtype != torch.float32}
    if narrow and not by_itself and beside() > 1:
        _share(narrow)
    return model.float()


def _floating(model: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating parameters and buffers, tied ones once."""
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_floating_point():
            yield name, tensor


def _share(narrow: dict[str, Tensor]) -> None:
    """Widen tensors in memory that the processes of this machine share, until one writes to a page of it."""
    from safetensors import safe_open

    first = int(os.environ.get("LOCAL_RANK", "0")) == 0
    with _memory() if first else _nothing() as memory:
        # Through the file's name: other processes of this user open it by that, too.
        path = f"/proc/{os.getpid()}/fd/{memory}" if first else None
        wide = {name: _wide(tensor) for name, tensor in narrow.items()}
        together(lambda: write_safetensors(Path(str(path)), wide) if first else None)
        machine = socket.gethostname()
        shared = next(found for where, found in gather((machine, path)) if where == machine and found)

        def take() -> None:
            with safe_open(shared, framework="pt", device="cpu") as stored:
                for name, tensor in narrow.items():
                    tensor.data = stored.get_tensor(name)

        together(take)


def _wide(tensor: Tensor) -> FinalTensor:
    return FinalTensor(tensor.shape, torch.float32, True, lambda: tensor.detach().float())


@contextmanager
def _memory() -> Iterator[int]:
    """A file that is in memory alone; it stays as long as somebody maps it."""
    handle = os.memfd_create("sft-weights")
    try:
        yield handle
    finally:
        os.close(handle)


@contextmanager
def _nothing() -> Iterator[int]:
    yield -1
