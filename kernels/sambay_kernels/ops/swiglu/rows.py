"""A tensor of any shape as a matrix whose rows stand any distance apart: halves of a projection need no copy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor


def as_rows(*values: Tensor) -> list[Tensor]:
    """Each as (rows, width) with contiguous rows, all in one row if they are contiguous; copied only where needed."""
    whole = all(value.is_contiguous() for value in values)
    found = [value.reshape((1, -1) if whole else (-1, value.shape[-1])) for value in values]
    return [value if value.stride(1) == 1 or value.shape[1] <= 1 else value.contiguous() for value in found]


@contextmanager
def in_type(outputs: Sequence[Tensor], dtype: torch.dtype) -> Iterator[list[Tensor]]:
    """Tensors of this type to be written inside: `outputs` themselves, or others whose values they get at the end."""
    made = [out if out.dtype == dtype else torch.empty_like(out, dtype=dtype) for out in outputs]
    yield made
    for out, value in zip(outputs, made, strict=True):
        if value is not out:
            out.copy_(value)
