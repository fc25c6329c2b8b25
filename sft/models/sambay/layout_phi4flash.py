"""How the tokens of a batch lie in one packed row, whichever way the batch came: packed, padded or plain.

All layers work on packed tokens `(T, hidden)` with document boundaries `cu_seqlens`, so padding costs nothing, takes
part in nothing, and there is one code path whose exactness has to be shown.

This file travels with a pushed checkpoint; it may import only torch and transformers, and its neighbours relatively.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from .contract_phi4flash import check_cache_position, check_second_borders, require


class RowShare(Protocol):
    """What a packed row's share has to know of the tokens before it, where several processes share the row.

    A document may begin in another share; here its part does. Shapes are those of the share's n tokens and S documents.
    """

    def conv_state(self, tokens: Tensor, taps: int) -> Tensor:
        """`(S, D, taps - 1)`: the tokens before each document, for a convolution over `tokens` `(n, D)`."""

    def scan_state(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, delta_bias: Any) -> Tensor:
        """`(S, D, N)`: the state before each document, of the scan with these inputs."""

    def keys_before(self, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys and values `(n, heads, d)`, with those before them that the share's queries see: `(m + n, heads, d)`."""

    def key_cu_seqlens(self, cu_seqlens: Tensor, window: int | None) -> Tensor:
        """`(S + 1,)`: the documents' borders among those keys."""


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
        packed: whether a row of the batch may hold several documents.
        kept_columns: how many columns `keep_last` left.
        share: where these tokens are a share of a longer row.
    """

    batch_shape: tuple[int, int]
    cu_seqlens: Tensor
    token_index: Tensor | None = None
    keep_index: Tensor | None = None
    keep_cu_seqlens: Tensor | None = None
    past_length: int = 0
    key_mask: Tensor | None = None
    longest: int = 0
    packed: bool = False
    kept_columns: int = 0
    share: RowShare | None = None

    @property
    def query_cu_seqlens(self) -> Tensor:
        """Document boundaries among the tokens that the cross-decoder computes."""
        return self.cu_seqlens if self.keep_cu_seqlens is None else self.keep_cu_seqlens

    def key_cu_seqlens(self, window: int | None) -> Tensor:
        """Document boundaries among the keys that queries with this window see."""
        return self.cu_seqlens if self.share is None else self.share.key_cu_seqlens(self.cu_seqlens, window)

    @property
    def is_step(self) -> bool:
        """Whether this is one token for every row of the cache: a decode step."""
        return self.past_length > 0 and self.batch_shape[1] == 1 and self.token_index is None

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Layout:
        """The same layout on another device: what accelerate calls where a model is spread over several."""
        if self.cu_seqlens.device == torch.device(device):
            return self
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def pack(self, batch: Tensor) -> Tensor:
        """`(B, T, ...)` -> the packed tokens `(N, ...)`."""
        flat = batch.reshape(-1, *batch.shape[2:])
        return flat if self.token_index is None else flat.index_select(0, self.token_index)

    def unpack(self, tokens: Tensor, padding: int = 0) -> Tensor:
        """Packed `(N, ...)` -> `(B, T, ...)`, `padding` where the batch has padding."""
        if self.token_index is not None:
            batch = tokens.new_full((self.batch_shape[0] * self.batch_shape[1], *tokens.shape[1:]), padding)
            tokens = batch.index_copy(0, self.token_index, tokens)
        return tokens.reshape(*self.batch_shape, *tokens.shape[1:])

    def keep(self, tokens: Tensor) -> Tensor:
        """Packed `(N, ...)` -> those that the cross-decoder computes."""
        return tokens if self.keep_index is None else tokens.index_select(0, self.keep_index)

    def unpack_kept(self, tokens: Tensor) -> Tensor:
        """Kept tokens of a layout as it was made, or made by `keep_last` -> `(B, columns, ...)`, zero on padding."""
        if self.keep_index is None:
            return self.unpack(tokens)
        rows, width = self.batch_shape
        columns = self.kept_columns
        place = self.keep_index if self.token_index is None else self.token_index.index_select(0, self.keep_index)
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
        return replace(self._keep(place % width >= width - columns), kept_columns=columns)

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


@dataclass(frozen=True)
class Documents:
    """What a caller says of a batch's documents, under the names of transformers' keywords.

    Attributes:
        attention_mask: `(B, T)` or, with a cache, `(B, past + T)`; one on tokens, zero on padding, on any side.
        cu_seq_lens_q: int32 `(S + 1,)`: boundaries of packed documents in the flattened batch; cu_seq_lens_k: the same.
        max_length_q, max_length_k: a bound on the tokens of a packed document; given, no one waits for a device.
        seq_idx: `(B, T)`: number of the document of each token of a packed row, read where cu_seq_lens_q is absent.
        position_ids: `(T,)`, `(1, T)` or `(B, T)`: a document starts wherever they don't go on by one.
        cache_position: `(T,)`: places in the cache; only those behind its tokens.
        row_share: of a packed row that several processes share, what went before these tokens.
    """

    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    cu_seq_lens_q: Tensor | None = None
    cu_seq_lens_k: Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None
    seq_idx: Tensor | None = None
    cache_position: Tensor | None = None
    row_share: RowShare | None = None

    @property
    def longest(self) -> int | None:
        """The bound on the tokens of a document, if one is told."""
        return min((int(told) for told in (self.max_length_q, self.max_length_k) if told is not None), default=None)


def make_layout(
    batch_shape: tuple[int, int], device: torch.device, documents: Documents | None = None, past_length: int = 0
) -> Layout:
    """The layout of a batch, from the most explicit description of its documents that is given.

    Args:
        batch_shape: `(B, T)`.
        past_length: columns in the cache.
    Raises:
        ValueError: when packed documents meet padding or a cache that holds tokens, when what is said of them is
            contradictory, or when shapes don't fit.
    """
    told = documents or Documents()
    rows, width = batch_shape
    check_second_borders(told.cu_seq_lens_q, told.cu_seq_lens_k)
    check_cache_position(told.cache_position, past_length, width)
    key_mask, index = _tokens(told.attention_mask, rows, width, past_length)
    if told.cu_seq_lens_q is not None:
        if key_mask is not None or past_length:
            raise ValueError("packed documents (cu_seq_lens) can't come with padding or a cache that holds tokens")
        boundaries = _check_cu_seqlens(told.cu_seq_lens_q, rows * width, told.longest)
        layout = Layout(batch_shape, boundaries.to(device, non_blocking=True), share=told.row_share)
        return _packed(layout, told.longest)
    if told.row_share is not None:
        raise ValueError("row_share: a share of a row tells its documents by cu_seq_lens_q")
    if key_mask is None:
        boundaries = torch.arange(0, rows * width + 1, max(width, 1), dtype=torch.int32, device=device)
    else:
        boundaries = torch.nn.functional.pad(key_mask[:, past_length:].sum(1).cumsum(0), (1, 0)).to(torch.int32)
    layout = Layout(
        batch_shape, boundaries, index, past_length=past_length, key_mask=key_mask, longest=past_length + width
    )
    starts = _inner_starts(layout, told.seq_idx, told.position_ids)
    if starts is None or starts.shape[0] == 0:
        return layout
    if past_length:
        raise ValueError("seq_idx or position_ids begin a document behind a cache that holds tokens: run it on its own")
    boundaries = torch.cat([boundaries, starts]).sort().values
    tokens = rows * width if index is None else index.shape[0]
    boundaries = _check_cu_seqlens(boundaries, tokens, told.longest)
    return _packed(replace(layout, cu_seqlens=boundaries), told.longest)


def _packed(layout: Layout, longest: int | None) -> Layout:
    """A packed layout. What isn't told of its longest document is counted, for which the host waits for a device."""
    if longest is None:
        longest = int(layout.cu_seqlens.diff().max()) if layout.cu_seqlens.numel() > 1 else 0
    return replace(layout, longest=longest, packed=True)


def _tokens(mask: Any, rows: int, width: int, past_length: int) -> tuple[Tensor | None, Tensor | None]:
    """The mask as bool `(B, past_length + T)`, and where the T columns' tokens lie; None where everything is one."""
    if mask is None:
        return None, None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask must be (batch, tokens), not of shape {shape}")
    if mask.shape != (rows, past_length + width):
        raise ValueError(
            f"attention_mask has shape {tuple(mask.shape)}; these tokens and the cache need "
            f"({rows}, {past_length + width})"
        )
    is_token = mask != 0
    new = is_token[:, past_length:]
    # One wait for the device, not three.
    facts = torch.stack([is_token.all(), new.all(), (is_token == mask).all()]).tolist()
    if not facts[2]:
        raise ValueError("attention_mask must hold ones and zeros; documents of a packed row are told by cu_seq_lens_q")
    if facts[0]:
        return None, None
    return is_token, None if facts[1] else new.reshape(-1).nonzero().squeeze(1)


def _inner_starts(layout: Layout, seq_idx: Tensor | None, position_ids: Tensor | None) -> Tensor | None:
    """Which packed tokens begin a document inside a row: where document numbers change or positions don't go on."""
    rows, width = layout.batch_shape
    given = position_ids if seq_idx is None else seq_idx
    if given is None or width < 2:
        return None
    if given.shape not in ((width,), (1, width), (rows, width)):
        name = "position_ids" if seq_idx is None else "seq_idx"
        raise ValueError(f"{name} has shape {tuple(given.shape)}; these tokens need ({rows}, {width})")
    flat = layout.pack(given.expand(rows, width))
    place = torch.arange(rows * width, device=flat.device) if layout.token_index is None else layout.token_index
    step = flat.diff()
    # Positions count either the row's tokens or its columns, padding included.
    breaks = (step != 1) & (step != place.diff()) if seq_idx is None else step != 0
    return (breaks & ((place // width).diff() == 0)).nonzero().squeeze(1) + 1


def _check_cu_seqlens(cu_seqlens: Tensor, tokens: int, longest: int | None) -> Tensor:
    """int32 boundaries, on the device they are given on: on the host they are checked without waiting for another.

    Raises:
        ValueError: when they don't go from 0 to `tokens` without falling, or a document is longer than `longest`.
    """
    boundaries = cu_seqlens.reshape(-1).to(torch.int32)
    if boundaries.numel() == 0:
        raise ValueError("cu_seq_lens is empty: it must go from 0 to the number of tokens")
    lengths = boundaries.diff()
    whole = (boundaries[0] == 0) & (boundaries[-1] == tokens) & (lengths >= 0).all()
    require(whole, f"cu_seq_lens must go from 0 to the number of tokens ({tokens}) and never fall")
    if longest is not None:
        require((lengths <= longest).all(), f"a packed document is longer than max_length_q ({longest})")
    return boundaries
