"""Calling the C++ decoding step: its structures, as in csrc/decoder.h, and how its matrices are packed."""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_int, c_int64, c_void_p
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpp_build import library
from .cpp_call import SUFFIXES

MAMBA, MEMORY_UNIT, ATTENTION = range(3)
PROBLEMS = {
    -1: "token {token} isn't in the vocabulary of {vocab}",
    -2: "there is no slot {slot}: there are {slots}",
    -3: "slot {slot} is named twice: its tokens must follow each other",
    -4: "slot {slot} is full: its table lists {listed} pages of {page_size} tokens, and it holds {length}",
    -5: "slot {slot}, which holds {length} tokens, lists a page that isn't one of {pages}",
    -6: "slot {slot} holds {length} tokens, which is below zero",
}


class Matrix(Structure):
    """A packed matrix."""

    _fields_ = (("panels", c_void_p), ("outputs", c_int64), ("terms", c_int64))


class Layer(Structure):
    """A layer's weights."""

    _fields_ = (
        *((name, c_int64) for name in ("mixer", "place", "window", "own_keys")),
        *((name, c_void_p) for name in ("norm_weight", "norm_bias", "mlp_norm_weight", "mlp_norm_bias")),
        *((name, Matrix) for name in ("into", "gate", "delta", "maps", "step", "out", "up", "down")),
        *((name, c_void_p) for name in ("in_bias", "out_bias")),
        *((name, c_void_p) for name in ("conv_weight", "conv_bias", "step_bias", "decay", "skip", "subln")),
        ("lambda_full", c_double),
    )


class Decoder(Structure):
    """A model's sizes and weights."""

    _fields_ = (
        *((name, c_int64) for name in ("count", "hidden", "vocab", "intermediate", "heads", "key_heads", "width")),
        *((name, c_int64) for name in ("inner", "states", "kept", "rank")),
        ("eps", c_double),
        *((name, c_void_p) for name in ("layers", "embed", "norm_weight", "norm_bias")),
        ("head", Matrix),
    )


class DecoderSlots(Structure):
    """Where states, rings and pages lie."""

    _fields_ = (
        *((name, c_int64) for name in ("slots", "pages", "page_size", "listed", "ring")),
        *((name, c_void_p) for name in ("conv", "scan", "ring_keys", "ring_values", "page_keys", "page_values")),
        *((name, c_void_p) for name in ("table", "lengths")),
    )


class Step(Structure):
    """A step's rows, its result and the memory that it works in."""

    _fields_ = (
        ("decoder", POINTER(Decoder)),
        ("slots", POINTER(DecoderSlots)),
        ("rows", c_int64),
        *((name, c_void_p) for name in ("tokens", "row_slots", "wanted", "logits", "room")),
        ("room_bytes", c_int64),
        ("wrong", c_int64),
    )


class Packing:
    """How matrices of a type are packed for this processor: in panels of two vectors of outputs, term by term.

    Attributes:
        lanes: outputs of a vector.
        terms: zeros fill them up to a multiple of this.
        side_by_side: terms that lie so.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.lanes, self.terms, self.side_by_side = (
            _number(f"sambay_decoder_{name}_{SUFFIXES[dtype]}") for name in ("lanes", "terms", "side_by_side")
        )

    def matrix(self, weight: Tensor) -> Tensor:
        """(outputs, inputs) -> (panels, terms, outputs of a panel, terms side by side), zeros around."""
        outputs, inputs = weight.shape
        padded = F.pad(weight, (0, -inputs % self.terms, 0, -outputs % (2 * self.lanes)))
        parts = padded.unflatten(0, (-1, 2 * self.lanes)).unflatten(2, (-1, self.side_by_side))
        return parts.transpose(1, 2).contiguous()

    def vectors(self, rows: Tensor) -> Tensor:
        """(count, ...), with zeros behind it up to whole vectors."""
        return F.pad(rows, (0,) * (2 * rows.dim() - 1) + (-rows.shape[0] % self.lanes,))

    def interleaved(self, gate_and_value: Tensor) -> Tensor:
        """(2 * count, inputs): a vector of gates' rows, then their values', and so on; zeros fill the last ones."""
        halves = torch.stack([self.vectors(half) for half in gate_and_value.chunk(2)])
        return halves.unflatten(1, (-1, self.lanes)).transpose(0, 1).flatten(0, 2)


def _number(name: str) -> int:
    function = getattr(library(), name)
    function.restype, function.argtypes = c_int64, ()
    return int(function())


def step_function(dtype: torch.dtype) -> Any:
    """Function of a Step's address and the number of threads; 0, or bytes it needs, or a key of PROBLEMS."""
    function = getattr(library(), f"sambay_decoder_step_{SUFFIXES[dtype]}")
    function.restype, function.argtypes = c_int64, (POINTER(Step), c_int)
    return function
