"""The model of a running training as `sft eval` would load it: the weights of now, and nothing of the training.

What training puts around a model (hooks, forwards under autocast or with another loss, modes, flags) would change its
answers, and an evaluation that changed any of it would change the training. So another object answers, which shares the
weights where they are held in the type that answers are given in.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sft.models.answering import answering_types
from sft.train.engine import switched_as_outside

if TYPE_CHECKING:
    from sft.train.trainer import SambayTrainer

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@contextmanager
def answering_model(trainer: SambayTrainer, dtype: str) -> Iterator[Any]:
    """The trainer's model with its weights of now, as `load_stage_model` would give it; on all ranks.

    The weights are the live ones, not copied, unless they are held in another type than they answer in, or ZeRO-3 has
    parted them among the ranks: then each rank holds whole copies of those meanwhile.
    """
    try:
        with switched_as_outside():
            yield _plain(trainer.model, dtype)
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def copied_bytes(model: Any, dtype: str) -> int:
    """Bytes of weights that `answering_model` copies."""
    types = answering_types(model, dtype)
    return sum(
        _numel(parameter) * types[name].itemsize
        for name, parameter in model.named_parameters()
        if _is_parted(parameter) or types[name] != parameter.dtype
    )


def _plain(model: Any, dtype: str) -> Any:
    """A copy of the modules without what training has put around them; see `answering_model` for the weights."""
    types = answering_types(model, dtype)
    memo: dict[int, Any] = {id(p): _held(p, types[name]) for name, p in model.named_parameters()}
    for module in model.modules():
        memo |= {id(hooks): OrderedDict() for name in _HOOKS if (hooks := getattr(module, name, None)) is not None}
        # A plain mapping also where ZeRO-3 has put one that asks the other ranks.
        memo[id(module._parameters)] = {
            name: None if parameter is None else memo[id(parameter)] for name, parameter in module._parameters.items()
        }
        if "forward" in vars(module):
            memo[id(vars(module)["forward"])] = None
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        vars(module).pop("forward", None)
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = False
    return copied.eval()


def _held(parameter: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    if not parameter.is_floating_point():
        return parameter  # in 4 bits, with a state of its own
    with _whole(parameter):
        values = parameter.detach().to(dtype)
        if _is_parted(parameter) and dtype == parameter.dtype:
            values = values.clone()
    return nn.Parameter(values, requires_grad=False)


def _is_parted(parameter: Any) -> bool:
    """Whether ZeRO-3 holds it."""
    return hasattr(parameter, "ds_id")


def _numel(parameter: Any) -> int:
    return int(parameter.ds_numel) if _is_parted(parameter) else parameter.numel()


def _whole(parameter: nn.Parameter) -> AbstractContextManager[Any]:
    if not _is_parted(parameter):
        return nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    gathered: AbstractContextManager[Any] = GatheredParameters([parameter])
    return gathered
