"""A model that is named by its folder or Hub id, ready to answer: whole weights, or an adapter on its base."""

from __future__ import annotations

from typing import Any

from sft.tokenizers.load import check_named, load_tokenizer


def load_named(name: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a folder or Hub id. A stage's folder stands for what it handed on.

    Raises:
        UserError: when there is none, or an adapter's base model can't be had.
    """
    # Before torch, whose import takes seconds.
    check_named(name, "model")
    from sft.hub.source import handed_on, is_adapter, open_source
    from sft.models.load import load_checkpoint, machine_dtype, on_device

    name = handed_on(name)
    if is_adapter(name):
        source = open_source(name)
        return on_device(_widened(source.model)), source.tokenizer or load_tokenizer(str(source.base))
    dtype = machine_dtype(name, "bfloat16", trust_remote_code=trust_remote_code)
    model = load_checkpoint(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return on_device(model), load_tokenizer(name)


def _widened(model: Any) -> Any:
    """In float32 on a CPU, where that isn't too large: see `machine_dtype`."""
    import torch

    from sft.models.load import CPU_FLOAT32

    size = 4 * sum(parameter.numel() for parameter in model.parameters())
    return model if torch.cuda.is_available() or size > CPU_FLOAT32 else model.float()
