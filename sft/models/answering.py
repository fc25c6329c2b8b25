"""The types that a model's weights are held in while it answers."""

from __future__ import annotations

from typing import Any

import torch

from sft.models.four_bit import is_four_bit
from sft.models.merge import base_of, wide_parts


def answering_types(model: Any, dtype: str) -> dict[str, torch.dtype]:
    """Parameter -> what it is held in by a model that answers in `dtype`, as loading in that type has it.

    What the model's class keeps in float32 stays so. Adapters stay as they are, and so do weights in 4 bits and what
    stands beside them.
    """
    parameters = dict(model.named_parameters())
    if is_four_bit(model):
        return {name: parameter.dtype for name, parameter in parameters.items()}
    wide, adapters = wide_parts(base_of(model)), _adapters(model)

    def held(name: str) -> torch.dtype:
        parts = name.split(".")
        if adapters is not None and any(part.startswith(adapters) for part in parts):
            return parameters[name].dtype
        return torch.float32 if any(part in wide for part in parts) else getattr(torch, dtype)

    return {name: held(name) for name in parameters}


def hold_in(model: Any, dtype: str) -> Any:
    """`model` itself, whose parameters are from now on held as `answering_types` says."""
    types = answering_types(model, dtype)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(types[name])
    return model


def _adapters(model: Any) -> str | None:
    """What the names of a peft model's adapters begin with."""
    return getattr(model.base_model, "prefix", None) if hasattr(model, "peft_config") else None
