"""Matrix products of as many rows as others had before: oneDNN compiles its bfloat16 products anew for each number."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

ROWS = 64
"""A linear layer's rows are filled up with zeros to a multiple of this."""


@contextmanager
def rounded_rows(model: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Inside, the linear layers of `model` compute multiples of ROWS rows, and return those that were asked for.

    Packed rows differ in length by a few tokens from step to step, and a product takes less time than its compilation.
    The output layer is left alone: a loss may take its place. Rows of zeros add nothing to a weight's gradient.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    hooks = []
    for layer in layers if wanted else []:
        asked: list[int] = []
        hooks += [
            layer.register_forward_pre_hook(partial(_fill, asked)),
            layer.register_forward_hook(partial(_cut, asked)),
        ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _fill(asked: list[int], module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    rows = args[0]
    asked.append(rows.shape[-2] if rows.dim() > 1 else 0)
    missing = -asked[-1] % ROWS
    return (F.pad(rows, (0, 0, 0, missing)), *args[1:]) if missing else args


def _cut(asked: list[int], module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    count = asked.pop()
    return output[..., :count, :] if count % ROWS else output
