"""Triton kernels on CPU tensors, by Triton's interpreter.

The interpreter is chosen when triton is imported, so these tests need a process of their own with TRITON_INTERPRET=1:
tests/kernels/test_triton.py starts it.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]


if INTERPRETED:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes an int of an array with one element (a loop's loaded bound), which NumPy 2.4 refuses."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = patch_tensor_and_index

    def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
        """Of each test's parameters the first are for every day; the interpreter takes seconds for each.

        Where nothing is interpreted the items are those of all other tests.
        """
        of_a_test: dict[str, list[pytest.Item]] = {}
        for item in items:
            of_a_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
        for group in of_a_test.values():
            for item in group[1:]:
                item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel should have written but didn't is NaN, not a lucky zero."""
    empty = torch.Tensor.new_empty

    def poisoned(self: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        made = empty(self, *args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() and made.device.type == "cpu" else made

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
