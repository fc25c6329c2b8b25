"""How the tokens of a batch lie in one packed row, whichever way the batch came: packed, padded or plain.

All layers work on packed tokens `(T, hidden)` with document boundaries `cu_seqlens`, so padding costs nothing, takes
part in nothing, and there is one code path whose exactness has to be shown.

This file travels with a pushed checkpoint; it may import only torch and transformers, and its neighbours relatively.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Where the packed tokens come from and where documents begin.

    Attributes:
        batch_shape: `(B, T)` of the batch.
        cu_seqlens: int32 `(S + 1,)`, boundaries of the S documents among the packed tokens.
        token_index: positions in the flattened batch of the packed tokens; None: all of them, in order.
        keep_index: positions among the packed tokens of those that the cross-decoder computes, a suffix of each
            document; None: all of them.
        keep_cu_seqlens: int32 `(S + 1,)`, boundaries of the documents among the kept tokens.
        past_length: columns already in the cache.
        key_mask: bool `(B, past_length + T)`, which columns are tokens; None: all. Only with a cache.
        longest: a bound on the tokens of a document, cached ones included. On an accelerator reading it off the
            borders makes the host wait, so it is done once for all layers.
    """

    batch_shape: tuple[int, int]
    cu_seqlens: Tensor
    token_index: Tensor | None = None
    keep_index: Tensor | None = None
    keep_cu_seqlens: Tensor | None = None
    past_length: int = 0
    key_mask: Tensor | None = None
    longest: int = 0

    @property
    def query_cu_seqlens(self) -> Tensor:
        """Document boundaries among the tokens that the cross-decoder computes."""
        return self.cu_seqlens if self.keep_cu_seqlens is None else self.keep_cu_seqlens

    @property
    def is_step(self) -> bool:
        """Whether this is one token for every row of the cache: a decode step."""
        return self.past_length > 0 and self.batch_shape[1] == 1 and self.token_index is None

    def pack(self, batch: Tensor) -> Tensor:
        """`(B, T, ...)` -> the packed tokens `(N, ...)`."""
        flat = batch.reshape(-1, *batch.shape[2:])
        return flat if self.token_index is None else flat[self.token_index]

    def unpack(self, tokens: Tensor, padding: int = 0) -> Tensor:
        """Packed `(N, ...)` -> `(B, T, ...)`, `padding` where the batch has padding."""
        if self.token_index is not None:
            batch = tokens.new_full((self.batch_shape[0] * self.batch_shape[1], *tokens.shape[1:]), padding)
            tokens = batch.index_copy(0, self.token_index, tokens)
        return tokens.reshape(*self.batch_shape, *tokens.shape[1:])

    def keep(self, tokens: Tensor) -> Tensor:
        """Packed `(N, ...)` -> those that the cross-decoder computes."""
        return tokens if self.keep_index is None else tokens[self.keep_index]

    def unpack_tail(self, tokens: Tensor, columns: int) -> Tensor:
        """Kept tokens of a layout made by `keep_last(columns)` -> `(B, columns, ...)`, zero where there is padding."""
        if self.keep_index is None:
            return self.unpack(tokens)[:, -columns:]
        rows, width = self.batch_shape
        place = self.keep_index if self.token_index is None else self.token_index[self.keep_index]
        place = place // width * columns + place % width - (width - columns)
        batch = tokens.new_zeros(rows * columns, *tokens.shape[1:])
        return batch.index_copy(0, place, tokens).reshape(rows, columns, *tokens.shape[1:])

    def keep_last(self, columns: int) -> Layout:
        """The same layout, the cross-decoder computing only the last `columns` columns of the batch."""
        rows, width = self.batch_shape
        if columns >= width:
            return self
        place = (
            torch.arange(rows * width, device=self.cu_seqlens.device) if self.token_index is None else self.token_index
        )
        return self._keep(place % width >= width - columns)

    def keep_supervised(self, targets: Tensor, ignore_index: int) -> Layout:
        """The same layout, the cross-decoder computing of each document the suffix from its first target on.

        Nothing below the cross-decoder reads its outputs, so the loss and every gradient stay the same.
        Args:
            targets: `(N,)`, what each packed token has to predict; `ignore_index` where the loss reads nothing.
        """
        count = targets.shape[0]
        position = torch.arange(count, device=targets.device)
        document = self.document_ids(count)
        first = torch.full((self.cu_seqlens.shape[0] - 1,), count, dtype=torch.long, device=targets.device)
        first = first.scatter_reduce(0, document, position.masked_fill(targets == ignore_index, count), "amin")
        return self._keep(position >= first[document])

    def document_ids(self, count: int) -> Tensor:
        """`(N,)`: the document of each of the `count` packed tokens."""
        lengths = (self.cu_seqlens[1:] - self.cu_seqlens[:-1]).long()
        documents = torch.arange(lengths.shape[0], device=lengths.device)
        return torch.repeat_interleave(documents, lengths, output_size=count)

    def _keep(self, kept: Tensor) -> Layout:
        index = kept.nonzero().squeeze(1)
        before = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).to(torch.int32)
        return replace(self, keep_index=index, keep_cu_seqlens=before[self.cu_seqlens.long()])


def next_token_targets(labels: Tensor, layout: Layout, ignore_index: int) -> Tensor:
    """What each packed token has to predict: the label of the next token of the same document.

    Args:
        labels: `(B, T)`, not shifted, as Hugging Face models take them.
    Returns:
        `(N,)`, `ignore_index` on the last token of each document.
    """
    packed = layout.pack(labels)
    targets = torch.nn.functional.pad(packed[1:], (0, 1), value=ignore_index)
    ends = layout.cu_seqlens[1:].long() - 1
    # An empty document's "last token" is the last one of the document before it, which has no next token either;
    # an empty first document's would be token -1, which is the row's last.
    return targets.index_fill(0, ends % max(targets.shape[0], 1), ignore_index) if targets.shape[0] else targets


def make_layout(
    batch_shape: tuple[int, int],
    device: torch.device,
    *,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_length: int = 0,
    longest: int | None = None,
) -> Layout:
    """The layout of a batch, from the most explicit description of its documents that is given.

    Args:
        batch_shape: `(B, T)`.
        attention_mask: `(B, T)` or, with a cache, `(B, past_length + T)`; zero on padding, on either side.
        cu_seqlens: int32 `(S + 1,)`: boundaries of packed documents in the flattened batch.
        seq_idx: `(B, T)`: number of the document of each token of a packed row.
        position_ids: `(1, T)`: in a single row without a mask, a document starts wherever they fall back.
        past_length: columns in the cache.
        longest: tokens of the longest packed document, if known; else they are counted.
    Raises:
        ValueError: when packed documents meet a mask or a cache, or when shapes don't fit.
    """
    rows, width = batch_shape
    if attention_mask is not None and attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must be (batch, tokens), not of shape {tuple(attention_mask.shape)}")
    if attention_mask is not None and bool(attention_mask.all()):
        attention_mask = None
    if cu_seqlens is None and past_length == 0 and attention_mask is None:
        cu_seqlens = _document_starts(batch_shape, seq_idx, position_ids)
    if cu_seqlens is not None:
        if attention_mask is not None or past_length:
            raise ValueError("packed documents (cu_seq_lens) can't come with padding or a cache that holds tokens")
        boundaries = _check_cu_seqlens(cu_seqlens, rows * width)
        if longest is None:
            longest = int(boundaries.diff().max()) if boundaries.numel() > 1 else 0
        return Layout(batch_shape, boundaries, longest=longest)
    if attention_mask is None:
        boundaries = torch.arange(0, rows * width + 1, width, dtype=torch.int32, device=device)
        return Layout(batch_shape, boundaries, past_length=past_length, longest=past_length + width)
    if attention_mask.shape != (rows, past_length + width):
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; these tokens and the cache need "
            f"({rows}, {past_length + width})"
        )
    return _padded_layout(batch_shape, attention_mask.bool(), past_length)


def _padded_layout(batch_shape: tuple[int, int], key_mask: Tensor, past_length: int) -> Layout:
    new = key_mask[:, past_length:]
    boundaries = torch.nn.functional.pad(new.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    index = None if bool(new.all()) else new.reshape(-1).nonzero().squeeze(1)
    longest = past_length + batch_shape[1]
    return Layout(
        batch_shape, boundaries, token_index=index, past_length=past_length, key_mask=key_mask, longest=longest
    )


def _document_starts(
    batch_shape: tuple[int, int], seq_idx: Tensor | None, position_ids: Tensor | None
) -> Tensor | None:
    """Boundaries from document numbers or from positions that fall back; None where the batch is not packed."""
    rows, width = batch_shape
    if seq_idx is not None:
        flat = seq_idx.reshape(-1)
        starts = flat[1:] != flat[:-1]
        starts[width - 1 :: width] = True  # a row's first token starts a document whatever its number
    elif position_ids is not None and rows == 1 and position_ids.numel() == width:
        flat = position_ids.reshape(-1)
        starts = flat[1:] != flat[:-1] + 1
        if not bool(starts.any()):
            return None
    else:
        return None
    inner = starts.nonzero().squeeze(1) + 1
    return torch.nn.functional.pad(torch.nn.functional.pad(inner, (1, 0)), (0, 1), value=rows * width).to(torch.int32)


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int) -> Tensor:
    boundaries = cu_seqlens.reshape(-1).to(torch.int32)
    if boundaries.device.type == "cpu" and (boundaries[0] != 0 or boundaries[-1] != tokens):
        raise ValueError(
            f"cu_seq_lens must go from 0 to the number of tokens ({tokens}), not from {int(boundaries[0])} "
            f"to {int(boundaries[-1])}"
        )
    return boundaries
