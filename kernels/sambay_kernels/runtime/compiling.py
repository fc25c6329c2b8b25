"""What torch.compile has to know of functions, without importing it: that takes as long as importing torch itself.

torch.compiler's own decorators import the compiler when a module is loaded; torch has these two for its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_traced(function: F) -> F:
    """As torch.compiler.assume_constant_result: a traced graph keeps what the function returned when it was traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_traced(function: F) -> F:
    """As torch.compiler.disable: a graph breaks around the function."""
    wrapped: Any = torch._disable_dynamo(function)
    return wrapped
