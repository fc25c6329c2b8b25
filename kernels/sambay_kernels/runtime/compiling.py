"""What torch.compile has to know of functions, without importing it: that takes as long as importing torch itself.

torch.compiler's own decorators import the compiler when a module is loaded; torch has these two for its own modules.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


def constant_when_traced(function: F) -> F:
    """As torch.compiler.assume_constant_result: a traced graph keeps what the function returned when it was traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def not_traced(function: F) -> F:
    """As torch.compiler.disable: a graph breaks around the function."""
    wrapped: Any = torch._disable_dynamo(function)
    return wrapped


def is_seen_by_torch_alone(*args: Any) -> bool:
    """Whether all tensors among these are plain and nothing follows: no trace, fake or wrapped one, mode or profiler.

    Then a registered op may do its work without torch's dispatcher, which takes as long as that of a small tensor.
    """
    followed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack()
    if followed or torch.autograd._profiler_enabled():
        return False
    return all(type(x) in (Tensor, torch.nn.Parameter) for x in args if isinstance(x, Tensor))
