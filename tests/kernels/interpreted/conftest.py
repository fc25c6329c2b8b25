"""Triton kernels on CPU tensors, by Triton's interpreter.

The interpreter is chosen when triton is imported, so these tests need a process of their own with TRITON_INTERPRET=1:
tests/kernels/test_triton.py starts it.
"""

from __future__ import annotations

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written but didn't is NaN, not a lucky zero."""
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = empty(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and made.device.type == "cpu" else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
