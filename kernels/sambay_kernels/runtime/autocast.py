"""Ops calculate in their own types, whatever torch.autocast says, in the forward and in the backward pass.

Autocast rounds the matrix products inside an op as it rounds those of a linear layer, unless it is switched off there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .compiling import not_traced

P = ParamSpec("P")
R = TypeVar("R")


def no_autocast(*args: Any) -> AbstractContextManager[Any]:
    """Autocast switched off for the device of the first tensor among `args`."""
    device = next((value.device.type for value in args if isinstance(value, Tensor)), "")
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def in_own_types(function: Callable[P, R]) -> Callable[P, R]:
    """Switch autocast off inside a function that autograd doesn't record: the body of a registered op, a step."""

    @functools.wraps(function)
    def inner(*args: P.args, **kwargs: P.kwargs) -> R:
        with no_autocast(*args, *kwargs.values()):
            return function(*args, **kwargs)

    return inner


class _Recorded(torch.autograd.Function):
    """A function whose backward runs in its own types too: autograd's would run as the caller's autocast says."""

    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.others = function, [None if isinstance(x, Tensor) else x for x in args]
        ctx.places = [place for place, x in enumerate(args) if isinstance(x, Tensor)]
        ctx.save_for_backward(*(args[place] for place in ctx.places))
        with no_autocast(*args):
            return function(*args)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        args = list(ctx.others)
        for place, value in zip(ctx.places, ctx.saved_tensors, strict=True):
            args[place] = value.detach().requires_grad_(ctx.needs_input_grad[1 + place])
        wanted = [place for place in ctx.places if ctx.needs_input_grad[1 + place]]
        with torch.enable_grad(), no_autocast(*args):
            made = ctx.function(*args)
            outputs = made if isinstance(made, tuple) else (made,)
            pairs = [(x, g) for x, g in zip(outputs, grads, strict=True) if x.requires_grad and g is not None]
            found = torch.autograd.grad(
                [x for x, _ in pairs], [args[i] for i in wanted], [g for _, g in pairs], allow_unused=True
            )
        by_place = dict(zip(wanted, found, strict=True))
        return (None, *(by_place.get(place) for place in range(len(args))))


@not_traced
def recorded_in_own_types(function: Callable[..., Any], *args: Any) -> Any:
    """`function(*args)` in plain torch, differentiable once, with autocast switched off both ways.

    The backward pass computes the function again: this is for references.
    """
    return _Recorded.apply(function, *args)
