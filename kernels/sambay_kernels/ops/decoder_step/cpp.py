"""A decoding step by the C++ extension: one call for all layers."""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import Any

import torch
from torch import Tensor

from ...native import decoder_call as native
from .slots import Slots
from .weights import AttentionWeights, DecoderWeights, LayerWeights, MambaWeights, MemoryUnitWeights

OP = "decoder_step"
_TENSORS = ("conv", "scan", "ring_keys", "ring_values", "page_keys", "page_values", "table", "lengths")


class CppDecoder:
    """A model's weights, packed once, and the memory of its steps.

    The packed matrices take as much memory as the model's own (a head that is the embedding counts once more: its rows
    are read as they are, its products from a packed copy) and don't follow when those change.

    A token's logits and states are the same bits whatever other rows a step has, in whatever order, however its
    sequence is cut into runs, on any number of threads. One step at a time.

    Raises:
        ValueError: a matrix or vector doesn't have the shape that the others ask for, or a layer reads what none below
            it makes.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self.dtype = weights.embed.dtype
        self.wide = torch.promote_types(self.dtype, torch.float32)
        self._kept: list[Tensor] = []  # what C++ points to
        self._packing = native.Packing(self.dtype)
        self._weights, mamba = weights, weights.mambas[0]
        if weights.key_heads % 2 or weights.heads % weights.key_heads:
            raise ValueError(f"{OP}: {weights.heads} heads can't read {weights.key_heads} key heads in pairs")
        self.inner, self.states = mamba.A.shape
        self.hidden = weights.embed.shape[1]
        self._mambas = self._windows = self._full = 0
        self._layers = (native.Layer * len(weights.layers))(*map(self._layer, weights.layers))
        embed = self._keep(weights.embed.contiguous())
        self._decoder = native.Decoder(
            len(weights.layers), self.hidden, weights.embed.shape[0], weights.layers[0].fc2.shape[1], weights.heads,
            weights.key_heads, weights.head_dim, self.inner, self.states, mamba.conv_weight.shape[1] - 1,
            mamba.dt_proj.shape[1], weights.eps, ctypes.addressof(self._layers), embed,
            self._vector(weights.norm_weight, self.hidden), self._vector(weights.norm_bias, self.hidden),
            self._matrix(weights.head, weights.embed.shape[0], self.hidden),
        )  # fmt: skip
        self._function = native.step_function(self.dtype)
        self._slots: tuple[Any, tuple[int, ...]] = (None, ())
        self._slot_args = native.DecoderSlots()
        self._room = torch.empty(0, dtype=torch.uint8)
        self._args = native.Step(ctypes.pointer(self._decoder), ctypes.pointer(self._slot_args))

    def __call__(self, slots: Slots, tokens: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Arguments and result as in `DecoderStep`; nothing has changed after an error.

        Raises:
            ValueError: rows, tokens or slots that can't be.
        """
        args, count = self._args, tokens.shape[0] if isinstance(tokens, Tensor) and tokens.dim() == 1 else -1
        for name, value in (("tokens", tokens), ("rows", rows)):
            _check(name, value, (count,) if count >= 0 else ("R",), torch.int64)
        self._read_slots(slots)
        if wanted is not None:
            _check("wanted", wanted, (count,), torch.bool)
        results = count if wanted is None else int(wanted.sum())
        logits = torch.empty(results, self._decoder.vocab, dtype=self.dtype)
        args.rows, args.tokens, args.row_slots = count, tokens.data_ptr(), rows.data_ptr()
        args.wanted = None if wanted is None else wanted.data_ptr()
        args.logits = logits.data_ptr()
        while (found := self._function(args, torch.get_num_threads())) > 0:
            self._room = torch.empty(found + found // 4, dtype=torch.uint8)
            args.room, args.room_bytes = self._room.data_ptr(), self._room.numel()
        if found < 0:
            raise ValueError(f"{OP}: {self._problem(found, slots, tokens, rows)}")
        return logits

    def _problem(self, found: int, slots: Slots, tokens: Tensor, rows: Tensor) -> str:
        row, known = self._args.wrong, self._slot_args
        slot = int(rows[row])
        return native.PROBLEMS[found].format(
            token=int(tokens[row]), vocab=self._decoder.vocab, slot=slot, slots=known.slots, pages=known.pages,
            listed=known.listed, page_size=known.page_size,
            length=int(slots.lengths[slot] + (rows[:row] == slot).sum()) if 0 <= slot < known.slots else None,
        )  # fmt: skip

    def _read_slots(self, slots: Slots) -> None:
        """Note where the slots' tensors lie, and check those that are new."""
        where = tuple(getattr(slots, name).data_ptr() for name in _TENSORS)
        if self._slots[0] is not None and self._slots[0]() is slots and self._slots[1] == where:
            return
        w, count = self._weights, slots.lengths.shape[0]
        windows = [m.window for m in w.windows if m.window is not None]
        ring = (len(windows), count, w.key_heads, slots.ring_keys.shape[3], w.head_dim)
        pages = (len(w.full), slots.page_keys.shape[1], w.key_heads, slots.page_size, w.head_dim)
        if max(windows, default=0) > ring[3]:
            raise ValueError(f"{OP}: rings of {ring[3]} places are too small for a window of {max(windows)}")
        kept = w.mambas[0].conv_weight.shape[1] - 1
        shapes = [
            ((len(w.mambas), count, self.inner, kept), self.dtype),
            ((len(w.mambas), count, self.inner, self.states), self.wide),
            *[(ring, self.dtype)] * 2, *[(pages, self.dtype)] * 2,
            ((count, slots.table.shape[1]), torch.int32), ((count,), torch.int32),
        ]  # fmt: skip
        for name, (shape, dtype) in zip(_TENSORS, shapes, strict=True):
            _check(f"slots.{name}", getattr(slots, name), shape, dtype)
        self._slot_args = native.DecoderSlots(count, pages[1], slots.page_size, slots.table.shape[1], ring[3], *where)
        self._args.slots = ctypes.pointer(self._slot_args)
        self._slots = (weakref.ref(slots), where)

    def _keep(self, value: Tensor) -> int:
        self._kept.append(value)
        return value.data_ptr()

    def _vector(self, value: Tensor, *shape: int) -> int:
        """A small tensor in the type of arithmetic."""
        if value.shape != shape:
            raise ValueError(f"{OP}: a vector of the model has shape {tuple(value.shape)} instead of {shape}")
        return self._keep(value.detach().to(self.wide).contiguous())

    def _matrix(self, value: Tensor, outputs: int, inputs: int) -> native.Matrix:
        if value.shape != (outputs, inputs) or value.dtype != self.dtype:
            raise ValueError(
                f"{OP}: a matrix of the model is {value.dtype} of shape {tuple(value.shape)} instead of {self.dtype} "
                f"of shape {(outputs, inputs)}"
            )
        panels = self._packing.matrix(value.detach())
        return native.Matrix(self._keep(panels), outputs, panels.shape[1] * panels.shape[3])

    def _layer(self, layer: LayerWeights) -> native.Layer:
        made, hidden, intermediate = native.Layer(), self.hidden, layer.fc2.shape[1]
        for name in ("norm_weight", "norm_bias", "mlp_norm_weight", "mlp_norm_bias"):
            setattr(made, name, self._vector(getattr(layer, name), hidden))
        up = self._packing.interleaved(layer.fc1)
        made.up = self._matrix(up, up.shape[0], hidden)
        made.down = self._matrix(layer.fc2, hidden, self._weights.layers[0].fc2.shape[1])
        if layer.fc1.shape[0] != 2 * intermediate:
            raise ValueError(f"{OP}: an MLP's fc1 has {layer.fc1.shape[0]} rows instead of {2 * intermediate}")
        if isinstance(layer.mixer, MambaWeights):
            self._mamba(made, layer.mixer)
        elif isinstance(layer.mixer, MemoryUnitWeights):
            made.mixer = native.MEMORY_UNIT
            _check_made(self._mambas, "memory")
            made.into = self._matrix(layer.mixer.in_proj, self.inner, hidden)
            made.out = self._matrix(layer.mixer.out_proj, hidden, self.inner)
        else:
            self._attention(made, layer.mixer)
        return made

    def _mamba(self, made: native.Layer, mixer: MambaWeights) -> None:
        inner, states, hidden = self.inner, self.states, self.hidden
        width, rank = self._weights.mambas[0].conv_weight.shape[1], self._weights.mambas[0].dt_proj.shape[1]
        made.mixer, made.place = native.MAMBA, self._mambas
        self._mambas += 1
        into, gate = mixer.in_proj.chunk(2)
        delta, b, c = mixer.x_proj.split([rank, states, states])
        maps = torch.cat([self._packing.vectors(b), self._packing.vectors(c)])
        made.into, made.gate = self._matrix(into, inner, hidden), self._matrix(gate, inner, hidden)
        made.delta, made.maps = self._matrix(delta, rank, inner), self._matrix(maps, maps.shape[0], inner)
        made.step, made.out = self._matrix(mixer.dt_proj, inner, rank), self._matrix(mixer.out_proj, hidden, inner)
        decay = self._packing.vectors(mixer.A.T * math.log2(math.e)).T
        made.conv_weight = self._vector(mixer.conv_weight.T, width, inner)
        made.conv_bias, made.step_bias = self._vector(mixer.conv_bias, inner), self._vector(mixer.dt_bias, inner)
        made.decay, made.skip = self._vector(decay, inner, decay.shape[1]), self._vector(mixer.D, inner)

    def _attention(self, made: native.Layer, mixer: AttentionWeights) -> None:
        w, hidden = self._weights, self.hidden
        queries, keys = w.heads * w.head_dim, w.key_heads * w.head_dim
        rows = queries + (2 * keys if mixer.own_keys else 0)
        made.mixer, made.window, made.own_keys = native.ATTENTION, mixer.window or 0, int(mixer.own_keys)
        if mixer.window is None:
            self._full += made.own_keys
            _check_made(self._full, "keys and values")
            made.place = self._full - 1
        elif mixer.own_keys:
            made.place = self._windows
            self._windows += 1
        else:
            raise ValueError(f"{OP}: a layer with a window must make keys and values of its own")
        made.into, made.out = self._matrix(mixer.qkv, rows, hidden), self._matrix(mixer.out_proj, hidden, queries)
        # Biases of products are rounded to the products' type, as nn.Linear's are.
        made.in_bias = self._vector(mixer.qkv_bias.to(self.dtype), rows)
        made.out_bias = self._vector(mixer.out_bias.to(self.dtype), hidden)
        made.subln = self._vector(mixer.subln.to(self.wide) * (1.0 - mixer.lambda_init), 2 * w.head_dim)
        made.lambda_full = float(mixer.lambda_full)


def _check_made(count: int, what: str) -> None:
    if count == 0:
        raise ValueError(f"{OP}: a layer reads {what} that no layer below it makes")


def _check(name: str, value: Any, shape: tuple[Any, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{OP}: {name} must be a tensor, got {type(value)}")
    if value.shape != shape or value.dtype != dtype or not value.is_contiguous() or value.device.type != "cpu":
        raise ValueError(
            f"{OP}: {name} must be a contiguous {dtype} of shape {shape} on cpu, "
            f"got {value.dtype} of shape {tuple(value.shape)} on {value.device}"
        )
