"""What the attention maps are given, as one thing.

The file imports nothing but torch, so that it can travel inside an exported model.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DiffInputs(NamedTuple):
    """Queries, keys, values and who sees whom, in the order of the registered ops; as in `differential_attention`.

    window 0 stands for none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    window: int
    scale: float
