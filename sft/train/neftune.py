"""NEFTune (arXiv 2310.05914) whose noise belongs to the document: the same alone, padded, or anywhere in a packed row.

transformers draws noise for a row, and scales it by the row's length: a document of 10 tokens in a row of 4,096 would
get a twentieth of the noise that it gets alone. Here, as in the paper, the length is the document's; and the noise
follows from its tokens, the seed and the epoch, so that neither its neighbours nor a restart change it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def document_noise(model: Any, alpha: float, *, seed: int, epoch: int) -> Iterator[None]:
    """Noise on `model`'s input embeddings in every forward pass in training mode inside this block.

    Uniform in +-alpha / sqrt(L d) for a document of L tokens at width d. Documents are those of `cu_seq_lens_q`
    (S + 1,), else the rows of `attention_mask` (B, T), else whole rows.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs: dict[str, Any] = {}

    def remember(_: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        inputs.update({"input_ids": positional[0] if positional else None, **keywords})

    def disturb(module: nn.Module, _: Any, embeds: Tensor) -> Tensor:
        if not base.training:
            return embeds
        return embeds + _noise(embeds, inputs, alpha, f"{seed} {epoch} ".encode())

    handles = [
        base.register_forward_pre_hook(remember, with_kwargs=True),
        base.get_input_embeddings().register_forward_hook(disturb),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noise(embeds: Tensor, inputs: Mapping[str, Any], alpha: float, key: bytes) -> Tensor:
    """Noise for `embeds` (B, T, d), document by document; none on padding."""
    noise = torch.zeros_like(embeds)
    ids = inputs["input_ids"].to("cpu", torch.int32)
    for row, places in _documents(inputs, *ids.shape):
        length, width = len(ids[row, places]), embeds.shape[2]
        digest = hashlib.blake2b(key + ids[row, places].numpy().tobytes(), digest_size=8).digest()
        generator = torch.Generator(embeds.device).manual_seed(int.from_bytes(digest, "little") >> 1)
        drawn = torch.rand((length, width), generator=generator, device=embeds.device)
        noise[row, places.to(embeds.device)] = ((2 * drawn - 1) * alpha / math.sqrt(length * width)).to(noise.dtype)
    return noise


def _documents(inputs: Mapping[str, Any], rows: int, columns: int) -> Iterator[tuple[int, Tensor]]:
    """Row and columns of each document."""
    ends, mask = inputs.get("cu_seq_lens_q"), inputs.get("attention_mask")
    if ends is not None:
        bounds = ends.tolist()
        yield from ((0, torch.arange(start, end)) for start, end in pairwise(bounds) if end > start)
        return
    for row in range(rows):
        places = torch.arange(columns) if mask is None else mask[row].nonzero().flatten().cpu()
        if len(places):
            yield row, places
