"""A tensor of any shape as a matrix whose rows stand any distance apart: halves of a projection need no copy."""

from __future__ import annotations

from torch import Tensor


def as_rows(*values: Tensor) -> list[Tensor]:
    """Each as (rows, width) with contiguous rows, all in one row if they are contiguous; copied only where needed."""
    whole = all(value.is_contiguous() for value in values)
    found = [value.reshape((1, -1) if whole else (-1, value.shape[-1])) for value in values]
    return [value if value.stride(1) == 1 or value.shape[1] <= 1 else value.contiguous() for value in found]
