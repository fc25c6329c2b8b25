"""A Mamba-1 layer's convolution and scan over vLLM's batch, with states in vLLM's cache. One form for every device.

vLLM's batch has the requests that write one token first, then those that read a piece of their prompt. For our ops all
of them are documents of one packed row: a request's states before the row are read from its slot, and those behind it
written back. vLLM's own kernels aren't asked: its CPU build lacks them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """The requests of a step: R of them, T tokens in all."""

    tokens: int
    slots: Tensor  # (R,) int64, where each one's states lie
    fresh: Tensor | None  # (R,) bool, whether it begins with this step; None: none of them
    borders: Tensor  # (R + 1,) int32, as `cu_seqlens`


def batch_of(metadata: Any) -> Batch:
    """The requests of a step, from vLLM's `Mamba1AttentionMetadata`."""
    decodes, tokens = metadata.num_decodes, metadata.num_decode_tokens
    slots, fresh = [], None
    if decodes:
        slots.append(metadata.state_indices_tensor_d[:decodes, 0])
    if metadata.num_prefills:
        slots.append(metadata.state_indices_tensor_p)
        fresh = torch.nn.functional.pad(~metadata.has_initial_states_p, (decodes, 0), value=False)
    where = torch.cat(slots).long()
    borders = torch.arange(tokens + 1, dtype=torch.int32, device=where.device)
    if metadata.num_prefills:
        borders = torch.cat([borders, metadata.query_start_loc_p[1:].to(torch.int32) + tokens])
    return Batch(tokens + metadata.num_prefill_tokens, where, fresh, borders)


def read_states(cache: Tensor, batch: Batch) -> Tensor:
    """Each request's state `(R, ...)` before the step, a copy; zeros where the request begins with it."""
    states = cache.index_select(0, batch.slots)
    return states if batch.fresh is None else states.masked_fill_(batch.fresh.view(-1, 1, 1), 0)


def write_states(cache: Tensor, batch: Batch, states: Tensor) -> None:
    """Put each request's state `(R, ...)` behind the step where the next step finds it."""
    cache.index_copy_(0, batch.slots, states.to(cache.dtype))
