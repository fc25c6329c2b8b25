"""Write a model folder tensor by tensor: safetensors files, their index, and the configurations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sft.models.merge import FinalTensor, base_of, final_tensors
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


def save_model(
    folder: Path,
    model: Any,
    *,
    dtype: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
    max_shard_size: str = SHARD,
) -> int:
    """Write `model` to `folder`, its adapters merged, with the memory of its largest tensor; the number of parameters.

    Tied tensors are stored once, and under the names of the published file where transformers has others.

    Args:
        dtype: "float32", "bfloat16" or "float16": what floating tensors are stored in, but for those that the model's
            class keeps in float32 (A_log and the lambdas of SambaY). Default: what they are held in.
        weights: the state dict to write where the model holds only a part of it (DeepSpeed).
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
    if any(name in tensors for name in tied):
        # Trained apart (modules_to_save): loading must not tie them again.
        _change_config(folder, tie_word_embeddings=False)
    stored = {name: _stored(base, name, tensor, dtype) for name, tensor in tensors.items()}
    _write_shards(folder, _published(base, stored), max_shard_size, count)
    return count


def _held(tensor: Tensor) -> FinalTensor:
    return FinalTensor(tensor.shape, tensor.dtype, True, lambda: tensor.detach().cpu())


def _stored(base: Any, name: str, tensor: FinalTensor, dtype: str | None) -> FinalTensor:
    """The tensor in the type that it is stored in."""
    wide, target = getattr(base, "_keep_in_fp32_modules_strict", None) or (), tensor.dtype
    if dtype is not None and target.is_floating_point:
        target = torch.float32 if any(part in wide for part in name.split(".")) else getattr(torch, dtype)
    return replace(tensor, dtype=target, read=lambda: tensor.read().to(target))


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
            tensor = tensors[name].read().contiguous()
            if (tensor.shape, tensor.dtype) != (tensors[name].shape, tensors[name].dtype):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not what the header says")
            handle.write(tensor.reshape(-1).view(torch.uint8).numpy().data)


def _change_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **values})
