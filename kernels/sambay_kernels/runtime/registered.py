"""Ops that torch knows (torch.library), called without its dispatcher where nothing follows the tensors.

Compilers, fake tensors, FLOP counters and tracers see a registered op and nothing inside it. A plain call pays for that
too: torch's bookkeeping takes as long as the arithmetic of a small tensor, at every op of every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .autocast import in_own_types
from .compiling import is_seen_by_torch_alone


class RegisteredOp:
    """A function of tensors and plain values that is a torch op; calling it computes it one way or the other."""

    def __init__(self, name: str, schema: str, function: Callable[..., Any]) -> None:
        self.function = in_own_types(function)
        self.op = torch.library.custom_op(f"sambay_kernels::{name}", self.function, mutates_args=(), schema=schema)
        self.register_fake = self.op.register_fake
        self._recorded: Any = None

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        """As torch.library's."""
        self.op.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = self.function(*args)
            setup_context(ctx=ctx, inputs=args, output=output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._recorded = type(self.op._name, (torch.autograd.Function,), methods)

    def __call__(self, *args: Any) -> Any:
        if not is_seen_by_torch_alone(*args):
            return self.op(*args)
        if not (torch.is_grad_enabled() and torch._C._any_requires_grad(*args)):
            return self.function(*args)
        # Without a backward of its own it can't be differentiated, and torch says so.
        return self.op(*args) if self._recorded is None else self._recorded.apply(*args)


def registered(name: str, schema: str) -> Callable[[Callable[..., Any]], RegisteredOp]:
    """Decorates the function that is the op sambay_kernels::`name`; autocast is switched off inside."""
    return lambda function: RegisteredOp(name, schema, function)
