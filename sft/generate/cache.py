"""Caches whose rows can leave and join while a batch is decoded.

transformers' `DynamicCache` grows every attention layer by concatenation, which copies the whole cache at every token,
and its `batch_select_indices` skips the states of linear-attention layers. The layers here write into buffers with
room to grow, and the functions below treat every kind of layer alike.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

_FIRST_ROOM = 64


class GrowingLayer(DynamicLayer):
    """Keys and values (B, H, T, D) in buffers that double when they are full: appending a token copies that token."""

    keys: Any
    values: Any

    def __init__(self) -> None:
        super().__init__()
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, t, D) and return all keys and values, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old = self.get_seq_length()
        new = old + key_states.shape[-2]
        if self._key_buffer is None or self._value_buffer is None or new > self._key_buffer.shape[-2]:
            room = max(2 * new if old else new + _FIRST_ROOM, _FIRST_ROOM)
            self._key_buffer = _with_room(self.keys, old, key_states, room)
            self._value_buffer = _with_room(self.values, old, value_states, room)
        self._key_buffer[:, :, old:new] = key_states
        self._value_buffer[:, :, old:new] = value_states
        self.keys, self.values = self._key_buffer[:, :, :new], self._value_buffer[:, :, :new]
        return self.keys, self.values

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these tensors instead; the next update gives them room."""
        self.keys, self.values = keys, values
        self._key_buffer = self._value_buffer = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order."""
        if self.get_seq_length() > 0:
            self.replace(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._key_buffer = self._value_buffer = None


class SlidingLayer(DynamicSlidingWindowLayer):
    """The last window - 1 keys and values, at the end of a buffer of two windows: most tokens move nothing."""

    keys: Any
    values: Any

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self._key_buffer: Tensor | None = None
        self._value_buffer: Tensor | None = None
        self._end = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append (B, H, t, D); returns what the t queries may see: up to window - 1 kept positions and the new ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        held = self.keys.shape[-2] if self.keys.numel() else 0
        self.cumulative_length += new
        if self._key_buffer is None or self._value_buffer is None or self._end + new > self._key_buffer.shape[-2]:
            room = max(2 * self.sliding_window, held + new)
            self._key_buffer = _with_room(self.keys, held, key_states, room)
            self._value_buffer = _with_room(self.values, held, value_states, room)
            self._end = held
        start, end = self._end - held, self._end + new
        self._key_buffer[:, :, self._end : end] = key_states
        self._value_buffer[:, :, self._end : end] = value_states
        self._end = end
        keep = max(end - (self.sliding_window - 1), start)
        self.keys, self.values = self._key_buffer[:, :, keep:end], self._value_buffer[:, :, keep:end]
        return self._key_buffer[:, :, start:end], self._value_buffer[:, :, start:end]

    def replace(self, keys: Tensor, values: Tensor) -> None:
        """Hold these tensors instead; the next update gives them room."""
        self.keys, self.values = keys, values
        self._key_buffer = self._value_buffer = None
        self._end = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in that order."""
        if self.is_initialized and self.keys.numel():
            self.replace(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._key_buffer = self._value_buffer = None
        self._end = 0


def _with_room(held: Tensor, length: int, like: Tensor, room: int) -> Tensor:
    """A buffer (B, H, room, D) that begins with the `length` positions of `held`."""
    buffer = like.new_empty((*like.shape[:2], room, like.shape[-1]))
    if length:
        buffer[:, :, :length] = held
    return buffer


def new_cache(config: Any) -> DynamicCache:
    """An empty cache for the model of `config`, with growing buffers in place of concatenation."""
    cache = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[index] = GrowingLayer()
        elif type(layer) is DynamicSlidingWindowLayer:
            cache.layers[index] = SlidingLayer(layer.sliding_window)
    return cache


def select_rows(cache: DynamicCache, rows: Tensor) -> None:
    """Keep the rows (n,) int64 of the batch, in that order, in every kind of layer.

    `DynamicCache.batch_select_indices` would leave the states of linear-attention layers as they are.
    """
    cache.reorder_cache(rows)  # type: ignore[arg-type]


def can_join(cache: DynamicCache) -> bool:
    """Whether rows can be added to this cache: all its layers are of the kinds that `join_rows` knows."""
    known = (GrowingLayer, SlidingLayer, LinearAttentionLayer)
    # By name: the layer that holds nothing is newer than the oldest transformers that runs here.
    return bool(cache.layers) and all(
        type(layer) in known or type(layer).__name__ == "DummyLayer" for layer in cache.layers
    )


def cache_keyword(model: Any) -> str:
    """The keyword under which a model takes its cache: `cache` since transformers 5.24, `past_key_values` before."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def join_rows(cache: DynamicCache, other: DynamicCache) -> None:
    """Put the rows of `other` behind those of `cache`.

    The shorter side gets zeros on the left, which the attention mask has to hide.
    """
    pairs: list[tuple[Any, Any]] = list(zip(cache.layers, other.layers, strict=True))
    for mine, theirs in pairs:
        if isinstance(mine, GrowingLayer | SlidingLayer):
            if mine.get_seq_length() == 0:
                continue
            mine.replace(_stack(mine.keys, theirs.keys), _stack(mine.values, theirs.values))
            if isinstance(mine, SlidingLayer):
                mine.cumulative_length = max(mine.cumulative_length, theirs.cumulative_length)
        elif isinstance(mine, LinearAttentionLayer):
            for held, added in (
                (mine.conv_states, theirs.conv_states),
                (mine.recurrent_states, theirs.recurrent_states),
            ):
                for index, state in held.items():
                    if state is not None:
                        held[index] = torch.cat([state, added[index]])


def trim_left(cache: DynamicCache, positions: int) -> None:
    """Forget the first `positions` positions, which no row uses any more."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer) and layer.get_seq_length() > 0:
            layer.replace(layer.keys[:, :, positions:], layer.values[:, :, positions:])
        elif isinstance(layer, SlidingLayer) and layer.get_seq_length() > 0:
            layer.cumulative_length -= positions
            surplus = max(layer.keys.shape[-2] - layer.cumulative_length, 0)
            layer.replace(layer.keys[:, :, surplus:], layer.values[:, :, surplus:])


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """(B1, H, t1, D) over (B2, H, t2, D), the shorter one with zeros in front of its positions."""
    length = max(first.shape[-2], second.shape[-2])
    return torch.cat([torch.nn.functional.pad(part, (0, 0, length - part.shape[-2], 0)) for part in (first, second)])
