"""Whether a checkpoint folder is whole, found out from headers and sizes before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sft.utils.errors import UserError, first_line


def check_checkpoint(folder: str | Path) -> None:
    """Refuse a model folder whose weights are missing or cut off.

    Args:
        folder: with config.json and model.safetensors, or its shards and model.safetensors.index.json.
    Raises:
        UserError: naming the file that is missing, cut off or broken.
    """
    folder = Path(folder)
    config = folder / "config.json"
    if not config.is_file() and (folder / "adapter_config.json").is_file():
        raise UserError(
            f"{folder} holds an adapter without its base model's weights: `sft export` merges them into one folder"
        )
    if not config.is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    json_object(config.read_bytes(), config)
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if single.is_file():
        check_safetensors(single)
    elif index.is_file():
        _check_shards(folder, index)
    elif not list(folder.glob("pytorch_model*.bin")):
        raise UserError(f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json")


def check_safetensors(path: Path) -> dict[str, Any]:
    """The header of a safetensors file whose size is what the header says.

    Raises:
        UserError: when the file is cut off or broken.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 + length:
            raise UserError(f"{path} is cut off: its header alone needs {8 + length} bytes, the file has {size}")
        header = json_object(handle.read(length), path)
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    end = max((_end(path, name, entry) for name, entry in tensors.items()), default=0)
    if size != 8 + length + end:
        raise UserError(f"{path} is cut off: {size} bytes instead of {8 + length + end}; copy or download it again")
    return tensors


def json_object(content: bytes, path: Path) -> dict[str, Any]:
    """The JSON object that a file, or its header, has to be.

    Raises:
        UserError: when it is something else, or no JSON at all.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is broken: {first_line(error)}; copy or download it again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is broken: it holds a {type(found).__name__} where names and values belong")
    return found


def _end(path: Path, name: str, entry: Any) -> int:
    """Where a tensor's bytes end."""
    match entry:
        case {"data_offsets": [int(start), int(end)]} if 0 <= start <= end:
            return end
    raise UserError(f"{path} is broken: it doesn't say where {name} lies; copy or download it again")


def _check_shards(folder: Path, index: Path) -> None:
    weight_map = json_object(index.read_bytes(), index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is broken: it has no weight_map; copy or download it again")
    strange = [
        shard for shard in weight_map.values() if not isinstance(shard, str) or not shard or shard != Path(shard).name
    ]
    if strange:
        raise UserError(f"{index} is broken: {strange[0]!r} is no file beside it; copy or download it again")
    held: dict[str, str] = {}
    for shard in sorted(set(weight_map.values())):
        if not (folder / shard).is_file():
            raise UserError(f"{folder} is incomplete: {shard} is missing; copy or download it again")
        held.update(dict.fromkeys(check_safetensors(folder / shard), shard))
    lost = [name for name, shard in weight_map.items() if held.get(name) != shard]
    if lost:
        raise UserError(f"{folder} is incomplete: {len(lost)} tensors are not where the index says, {lost[0]} first")
