"""Choosing a token: the public function."""

from __future__ import annotations

import torch
from torch import Tensor

from ...runtime.checks import check_leading, check_tensor
from ...runtime.dispatch import backend_for, register
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .inputs import Choice
from .torch import choose_token_torch
from .triton import choose_token_triton

OP = "choose_token"

# Other types have too many kinds of logits to count: they are sorted.
register(OP, "triton", TRITON_DEVICES, triton_problem, (torch.bfloat16,))
register(OP, "torch")


@torch.no_grad()
def choose_token(logits: Tensor, choice: Choice) -> tuple[Tensor, Tensor]:
    """The next token of each row, and its row's largest logit.

    Of equal logits the one with the lower id counts as the larger. A sampled token inverts the cumulative distribution
    of the tokens that are kept, in the order of their ids, at the row's random number. On a GPU the host is not asked.

    Args:
        logits: (R, V); finite but for -inf, which is never chosen; a row's largest logit tells whether they were.

    Returns:
        tokens (R,) int64, and largest logits (R,) in the logits' type.

    Raises:
        ValueError: shapes or devices that don't fit.
        TypeError: an argument is not a tensor.
    """
    check_leading(OP, "logits", logits, 2)
    for name, value in choice._asdict().items():
        also = (torch.int32, torch.int64) if name == "top_k" else ()
        check_tensor(OP, name, value, (logits.shape[0],), logits.device, also)
    if backend_for(OP, logits) == "triton":
        return choose_token_triton(logits, choice)
    return choose_token_torch(logits, choice)
