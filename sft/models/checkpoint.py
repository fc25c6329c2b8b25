"""Whether a checkpoint folder is whole, found out from headers and sizes before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from sft.utils.errors import UserError


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a model folder whose weights are missing or cut off.

    Args:
        folder: with config.json and model.safetensors, or its shards and model.safetensors.index.json.
    Raises:
        UserError: naming the file that is missing, cut off or broken.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        check_safetensors(single)
    elif index.is_file():
        _check_shards(folder, index)
    elif not list(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")


def check_safetensors(path: Path) -> dict[str, dict]:
    """The header of a safetensors file whose size is what the header says.

    Raises:
        UserError: when the file is cut off or broken.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 + length:
            raise UserError(f"{path} is cut off: its header alone needs {8 + length} bytes, the file has {size}")
        try:
            header = json.loads(handle.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is broken: its header can't be read") from error
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if size != 8 + length + end:
        raise UserError(f"{path} is cut off: {size} bytes instead of {8 + length + end}; copy or download it again")
    return tensors


def _check_shards(folder: Path, index: Path) -> None:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError) as error:
        raise UserError(f"{index} is broken: {error}") from error
    held: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} is incomplete: {shard} is missing; copy or download it again")
        held.update(dict.fromkeys(check_safetensors(folder / shard), shard))
    lost = [name for name, shard in weight_map.items() if held.get(name) != shard]
    if lost:
        raise UserError(f"{folder} is incomplete: {len(lost)} tensors are not where the index says, {lost[0]} first")
