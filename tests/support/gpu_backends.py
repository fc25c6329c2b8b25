"""Choosing a backend on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import packed_ops as ops
import pytest
from sambay_kernels.native import cuda_build


@contextmanager
def chosen(name: str) -> Iterator[None]:
    """The backend for float32 and below; skips where there is no nvcc for `cuda`, and fails where it doesn't work."""
    if name == "cuda" and cuda_build.compiler() is None:
        pytest.skip(f"no nvcc: {cuda_build.REMEDY}")
    with ops.backend(name):
        yield
