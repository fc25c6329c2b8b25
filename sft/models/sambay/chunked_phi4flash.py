"""An MLP over a long row, a chunk of its tokens at a time, in the forward pass and in the backward pass.

What an MLP makes inside is several times as wide as its input, and in the backward pass of a whole row all of it would
be there at once, with its gradient. Here each chunk is computed again and gone before the next: the products are
as many as under activation checkpointing, which does an MLP's products again anyway.

This file travels with a pushed checkpoint; it may import only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

CHUNK = 8192
"""Tokens at a time; a product of as many rows is as fast as one of more."""


def mlp_in_chunks(first: Callable[[Tensor], Tensor], last: nn.Module, tokens: Tensor) -> Tensor:
    """`last(first(tokens))` of `(N, width)`, `CHUNK` tokens at a time; differentiable once.

    The gradient of a weight is summed over chunks in float32 (at least), and rounded once.

    Args:
        first: made of modules without dropout, which would drop out other values when it is computed again.
    """
    owners = [owner for owner in (getattr(first, "__self__", None), last) if isinstance(owner, nn.Module)]
    parameters = {id(p): p for owner in owners for p in owner.parameters() if p.requires_grad}
    held = _Held()
    return _Chunks.apply(_Input.apply(tokens, held), held, first, last, *parameters.values())


def can_be_chunked(mlp: nn.Module, tokens: int) -> bool:
    """Whether a row is long, and computing parts of it again gives the same: no dropout, no parted weight (ZeRO-3)."""
    if tokens <= CHUNK:
        return False
    drops = any(isinstance(module, nn.Dropout) and module.p and module.training for module in mlp.modules())
    return not drops and not any(hasattr(parameter, "ds_id") for parameter in mlp.parameters())


class _Held:
    """Where the chunks' backward pass finds their input."""

    ctx: Any = None


class _Input(torch.autograd.Function):
    """Saves the input and does nothing else.

    Under activation checkpointing a layer's second forward pass ends when it has all that was saved: here, before the
    MLP, which the backward pass below does again by itself.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, held: _Held) -> Tensor:
        ctx.save_for_backward(tokens)
        held.ctx = ctx
        return tokens.view_as(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Chunks(torch.autograd.Function):
    """The MLP. It saves nothing."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, held: _Held, first: Any, last: nn.Module, *parameters: Tensor) -> Tensor:
        device = tokens.device.type
        ctx.held, ctx.first, ctx.last, ctx.parameters = held, first, last, parameters
        ctx.autocast = None
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            ctx.autocast = torch.get_autocast_dtype(device)
        whole, tokens = None, tokens.detach()
        for start in range(0, tokens.shape[0], CHUNK):
            made = last(first(tokens[start : start + CHUNK]))
            whole = made.new_empty(tokens.shape[0], made.shape[1]) if whole is None else whole
            whole[start : start + CHUNK] = made
        assert whole is not None
        return whole

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (tokens,) = ctx.held.ctx.saved_tensors
        of_tokens = torch.empty_like(tokens) if ctx.needs_input_grad[0] else None
        totals: list[Tensor | None] = [None for _ in ctx.parameters]
        context = torch.autocast(tokens.device.type, ctx.autocast, ctx.autocast is not None, cache_enabled=False)
        for start in range(0, tokens.shape[0], CHUNK):
            chunk = slice(start, start + CHUNK)
            of_read = _of_chunk(ctx, context, tokens[chunk], grad[chunk], totals)
            if of_tokens is not None:
                of_tokens[chunk] = of_read
        of_weights = [
            None if total is None else total.to(p.dtype) for total, p in zip(totals, ctx.parameters, strict=True)
        ]
        return of_tokens, None, None, None, *of_weights


def _of_chunk(ctx: Any, autocast: Any, tokens: Tensor, grad: Tensor, totals: list[Tensor | None]) -> Tensor:
    """A chunk's gradient. Those of the weights are added to `totals`, and gone before the next chunk's are made."""
    read = tokens.detach().requires_grad_()
    with torch.enable_grad(), autocast:
        made = _again(ctx.last, ctx.first(read.view_as(read)))  # hooks of a FLOP counter take no leaf here
    of_read, *found = torch.autograd.grad(made, [read, *ctx.parameters], grad, allow_unused=True)
    for place, one in enumerate(found):
        if one is not None:
            totals[place] = _added(totals[place], one)
    return of_read


def _added(total: Tensor | None, one: Tensor) -> Tensor:
    if total is None:
        return one.to(torch.promote_types(one.dtype, torch.float32))
    return total.add_(one)


def _again(last: nn.Module, inner: Tensor) -> Tensor:
    """`last(inner)` for its gradients alone: of a plain projection the product itself is left out."""
    if type(last) is not nn.Linear or last.bias is not None:
        return last(inner)
    device = inner.device.type
    weight = last.weight
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        inner, weight = inner.to(dtype), weight.to(dtype)
    return _Unread.apply(inner, weight)


class _Unread(torch.autograd.Function):
    """A linear projection whose result nobody reads: it isn't computed."""

    @staticmethod
    def forward(ctx: Any, inner: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(inner, weight)
        return inner.new_empty(inner.shape[0], weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        inner, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return grad @ weight, grad.T @ inner if ctx.needs_input_grad[1] else None
