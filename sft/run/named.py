"""A model that is named by its folder or Hub id, ready to answer: whole weights, or an adapter on its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sft.tokenizers.load import check_named, load_tokenizer


def load_named(name: str, trust_remote_code: bool = False, *, dtype: str | None = None) -> tuple[Any, Any]:
    """The model and tokenizer of a folder or Hub id. A stage's folder stands for what it handed on.

    `dtype`: what it answers in, "float32" or "bfloat16". Default: bfloat16 on a GPU, and on a CPU that multiplies it in
    hardware where it is stored in it; else see `machine_dtype`. What a run handed on counts as stored in the run's
    `model.dtype`.
    Raises:
        UserError: when there is none, or an adapter's base model can't be had.
    """
    # Before torch, whose import takes seconds.
    check_named(name, "model")
    from sft.hub.source import handed_on, is_adapter
    from sft.models.load import load_checkpoint, machine_dtype, on_device

    name = handed_on(name)
    if is_adapter(name):
        model, tokenizer = _with_adapter(name, dtype)
        return on_device(model), tokenizer
    if dtype is None and _multiplies_bf16() and _stored(name, trust_remote_code) == "bfloat16":
        dtype = "bfloat16"
    dtype = dtype or machine_dtype(name, "bfloat16", trust_remote_code=trust_remote_code)
    model = load_checkpoint(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return on_device(model), load_tokenizer(name)


def _stored(name: str, trust_remote_code: bool) -> str:
    """The type that the model of a folder or Hub id is stored in, as what stands beside it says."""
    from sft.hub.source import find_run, recipe_of
    from sft.models.load import configured_dtype

    recipe = recipe_of(find_run(Path(name))) if Path(name).is_dir() else None
    return configured_dtype(name, trust_remote_code=trust_remote_code) if recipe is None else recipe.model.dtype


def _multiplies_bf16() -> bool:
    """Whether models answer on a CPU that multiplies bfloat16 in hardware."""
    import torch

    from sft.utils.processor import bf16_unit

    return not torch.cuda.is_available() and bf16_unit() is not None


def _with_adapter(name: str, dtype: str | None) -> tuple[Any, Any]:
    """An adapter on its base. By itself: as it is stored, but in float32 on a CPU, where that isn't too large and
    bfloat16 isn't multiplied in hardware."""
    import torch

    from sft.hub.source import open_source
    from sft.models.answering import hold_in
    from sft.models.load import CPU_FLOAT32

    source = open_source(name)
    model, tokenizer = source.model, source.tokenizer or load_tokenizer(str(source.base))
    if dtype is None and _multiplies_bf16() and source.dtype == "bfloat16":
        dtype = "bfloat16"
    if dtype is not None:
        return hold_in(model, dtype), tokenizer
    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return (model if torch.cuda.is_available() or size > CPU_FLOAT32 else model.float()), tokenizer
