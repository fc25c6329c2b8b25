"""A tensor that many layers read, whose gradient is summed in float32.

The gated memory units all read the memory of layer L/2. In half precision autograd would round the sum of their
gradients once for every unit; here each adds to one float32 buffer, and the sum is rounded once.

This file travels with a pushed checkpoint; it may import only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class SharedTensor:
    """Hands out a tensor to readers: `read()` for each. Its gradient is their gradients' float32 sum, rounded once."""

    def __init__(self, tensor: Tensor) -> None:
        # The graph holds the sum alone: with this object, which holds a tensor of the graph, it would be a cycle, and
        # the tensor would live until the garbage collector comes by.
        self._sum = _Sum()
        self.tensor: Tensor = _Source.apply(tensor, self._sum)

    def read(self) -> Tensor:
        """The tensor, for one reader."""
        return _Reader.apply(self.tensor, self._sum)


class _Sum:
    """The readers' gradients so far, float32."""

    total: Tensor | None = None


class _Source(torch.autograd.Function):
    """Its backward runs when those of all readers have run, and takes what they left."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shared: _Sum) -> Tensor:
        ctx.shared, ctx.dtype = shared, tensor.dtype
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        total, ctx.shared.total = ctx.shared.total, None
        if total is not None:
            grad = total.to(ctx.dtype) if grad is None else (total + grad).to(ctx.dtype)
        return grad, None


class _Reader(torch.autograd.Function):
    """Leaves its gradient in the buffer and passes nothing on."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, shared: _Sum) -> Tensor:
        ctx.shared = shared
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        if ctx.shared.total is None:
            ctx.shared.total = grad.to(torch.float32, copy=True)
        else:
            ctx.shared.total.add_(grad)
        return None, None
