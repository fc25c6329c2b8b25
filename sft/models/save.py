"""Write a model folder tensor by tensor: safetensors files, their index, and the configurations."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sft.models.merge import FinalTensor, base_of, final_tensors, wide_parts
from sft.utils.files import write_json
from sft.utils.quiet import no_library_bars

WEIGHTS = "model{suffix}.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "5GB"

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
STORED_TYPES = {name: dtype for dtype, name in _NAMES.items()}
"""A safetensors header's name of a type -> the type."""


def save_model(
    folder: Path,
    model: Any,
    *,
    dtype: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_size: str = SHARD,
    sums: dict[str, str] | None = None,
) -> int:
    """Write `model` to `folder`, its adapters merged, with the memory of its largest tensor; the number of parameters.

    Tied tensors are stored once, and under the names of the published file where transformers has others.

    Args:
        dtype: "float32", "bfloat16" or "float16": what floating tensors are stored in, but for those that the model's
            class keeps in float32 (A_log and the lambdas of SambaY). Default: what they are held in.
        weights: the state dict to write where the model holds only a part of it (DeepSpeed).
        sums: is filled with the `tensor_sum` of each tensor as it is written, by its name in the model.
    Raises:
        UserError: when an adapter can't be merged.
    """
    base = base_of(model)
    tied = getattr(base, "all_tied_weights_keys", None) or {}
    if weights is None:
        tensors = final_tensors(model)
    else:
        tensors = {name: _held(tensor) for name, tensor in weights.items() if name not in tied}
    count = sum(tensor.shape.numel() for tensor in tensors.values() if tensor.is_parameter)
    with no_library_bars():
        base.save_pretrained(folder, state_dict={})
    drop_absent_code(folder / "config.json")
    if any(name in tensors for name in tied):
        # Trained apart (modules_to_save): loading must not tie them again.
        _change_config(folder, tie_word_embeddings=False)
    stored = {name: _stored(base, name, tensor, dtype, sums) for name, tensor in tensors.items()}
    _write_shards(folder, _published(base, stored), max_shard_size, count)
    return count


def drop_absent_code(path: Path) -> None:
    """Take out of a configuration's `auto_map` the classes whose code isn't in its folder.

    A model that transformers has a class for keeps the map of the checkpoint that it came from, whose files don't
    travel: whoever trusts the folder's code then can't load it, and whoever doesn't is asked to for nothing.
    """
    config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    mapped = config.pop("auto_map", None)
    if not mapped:
        return
    # Tokenizers of old have a list of two classes in the map's place.
    mapped = mapped if isinstance(mapped, dict) else {"AutoTokenizer": mapped}
    here = {name: value for name, value in mapped.items() if _is_here(value, path.parent)}
    write_json(path, {**config, "auto_map": here} if here else config)


def _is_here(value: Any, folder: Path) -> bool:
    """Whether the files of a class, or of a slow and a fast one, are in `folder`."""
    names = [name for name in (value if isinstance(value, list) else [value]) if name]
    return all((folder / f"{str(name).rpartition('.')[0]}.py").is_file() for name in names)


def _held(tensor: Tensor) -> FinalTensor:
    return FinalTensor(tensor.shape, tensor.dtype, True, lambda: tensor.detach().cpu())


def _stored(base: Any, name: str, tensor: FinalTensor, dtype: str | None, sums: dict[str, str] | None) -> FinalTensor:
    """The tensor in the type that it is stored in."""
    wide, target = wide_parts(base), tensor.dtype
    if dtype is not None and target.is_floating_point:
        target = torch.float32 if any(part in wide for part in name.split(".")) else getattr(torch, dtype)

    def read() -> Tensor:
        value = tensor.read().to(target)
        if sums is not None:
            sums[name] = tensor_sum(value)
        return value

    return replace(tensor, dtype=target, read=read)


def tensor_sum(tensor: Tensor) -> str:
    """What a tensor's values are known by: type, shape and SHA-256."""
    values = hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
    return f"{tensor.dtype} {list(tensor.shape)} {values}"


def _published(base: Any, tensors: dict[str, FinalTensor]) -> dict[str, FinalTensor]:
    """The tensors by the names of the published file. Where transformers fuses or splits some while loading, all have
    to be in memory to undo that."""
    from transformers.core_model_loading import revert_weight_conversion

    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    published = revert_weight_conversion(base, _without_data(tensors))
    if {name: tensor.shape for name, tensor in published.items()} == shapes:
        return tensors
    whole = revert_weight_conversion(base, {name: tensor.read() for name, tensor in tensors.items()})
    return {name: _held(tensor) for name, tensor in whole.items()}


def _without_data(tensors: Mapping[str, FinalTensor]) -> dict[str, Tensor]:
    return {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in tensors.items()}


def _write_shards(folder: Path, tensors: dict[str, FinalTensor], max_shard_size: str, count: int) -> None:
    """The weight files and, where there are several, their index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    split = split_torch_state_dict_into_shards(
        _without_data(tensors), filename_pattern=WEIGHTS, max_shard_size=max_shard_size
    )
    for file, names in split.filename_to_tensors.items():
        write_safetensors(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        metadata = {"total_parameters": count, **split.metadata}
        write_json(folder / INDEX, {"metadata": metadata, "weight_map": split.tensor_to_filename})


def write_safetensors(path: Path, tensors: Mapping[str, FinalTensor]) -> None:
    """One safetensors file, a tensor at a time.

    The format (header's length, header, the tensors' bytes) is that of github.com/huggingface/safetensors. Wide types
    come first, so that every tensor is aligned.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        shape, dtype = tensors[name].shape, tensors[name].dtype
        begin, end = end, end + shape.numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_values(handle, name, tensors[name])


def _write_values(handle: IO[bytes], name: str, tensor: FinalTensor) -> None:
    count = 0
    for piece in [tensor.read()] if tensor.pieces is None else tensor.pieces():
        if piece.dtype != tensor.dtype or (tensor.pieces is None and piece.shape != tensor.shape):
            raise ValueError(f"{name} is {piece.dtype} {list(piece.shape)}, not what the header says")
        handle.write(piece.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        count += piece.numel()
    if count != tensor.shape.numel():
        raise ValueError(f"{name} has {count} values, not what the header says")


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})
