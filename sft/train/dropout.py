"""Adapters' dropout that belongs to the document: the same alone, padded, in a packed row, or in parts on ranks.

torch draws numbers in the order in which tokens come, so that what is dropped of a document would follow from its
neighbours, the micro-batch and the number of processes. Here all masks are stretches of one long random tape, which is
drawn from the seed anew for each epoch: where the stretch of a token begins follows from its document's tokens, its
place among them and the module. Each value is dropped with the chance that was asked for; and what is computed again in
the backward pass finds the same mask without a state of a generator being kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sft.models.sambay.layout_phi4flash import Layout
from sft.train.collator import TOKEN_KEYS

TAPE = 1 << 22
"""Values of the tape, many times an adapter's input."""
_ODD = 0x1E3779B97F4A7C15
"""An odd multiplier below 2^63, near the golden ratio's."""


class Drawn:
    """What the masks of a pass are made of: a key for each token, and the tape.

    Attributes:
        epoch: the one that is trained; another has another tape.
    """

    def __init__(self, seed: int) -> None:
        self.seed, self.epoch = seed, 0
        self._keys: Tensor | None = None
        self._by_shape: dict[tuple[int, ...], Tensor] = {}
        self._tape: tuple[Any, Tensor] | None = None

    def begin(self, inputs: Mapping[str, Any]) -> None:
        """A pass over a batch of a collator's, which knows a key for each token: int64 (B, T)."""
        self._keys = inputs[TOKEN_KEYS]
        self._by_shape = {tuple(self._keys.shape): self._keys}

    def lay_out(self, layout: Layout) -> None:
        """The model computes packed tokens, and in its second half fewer."""
        self._by_shape.clear()
        if self._keys is None or tuple(self._keys.shape) != tuple(layout.batch_shape):
            return  # a probe's tokens
        packed = layout.pack(self._keys)
        for keys in (packed, layout.keep(packed)):
            self._by_shape[tuple(keys.shape)] = keys

    def of(self, shape: tuple[int, ...]) -> Tensor | None:
        """The keys of tokens of this shape; None where nothing is known of them (experts, which get some of many)."""
        return self._by_shape.get(shape)

    def tape(self, p: float, device: torch.device) -> Tensor:
        """bool (TAPE,): what stays. Drawn by the host: the same on every device."""
        what = (self.seed, self.epoch, p, device)
        if self._tape is None or self._tape[0] != what:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            self._tape = what, (torch.rand(TAPE, generator=generator) >= p).to(device)
        return self._tape[1]


class DocumentDropout(nn.Dropout):
    """Dropout of `(..., d)`, whose masks are those of `drawn`; `number`: the module's."""

    def __init__(self, p: float, number: int, drawn: Drawn) -> None:
        super().__init__(p)
        self.number, self.drawn = number, drawn

    def forward(self, x: Tensor) -> Tensor:
        """`x / (1 - p)` where it stays, else 0; `x` itself outside of training."""
        keys = self.drawn.of(tuple(x.shape[:-1])) if self.training and self.p else None
        if keys is None:
            return super().forward(x)
        mixed = (keys ^ (keys >> 29)) * _ODD + self.number * _ODD % (1 << 62)
        starts = ((mixed ^ (mixed >> 32)) & (2**62 - 1)) % (TAPE - x.shape[-1])
        stays = self.drawn.tape(self.p, x.device).unfold(0, x.shape[-1], 1)[starts]
        return (x * stays).mul_(1 / (1 - self.p))


def drop_by_documents(model: Any, seed: int) -> Drawn | None:
    """Make every adapter's dropout one by documents; None where there is none.

    `Drawn.begin` has to be called before each pass in training.
    """
    drawn, number = Drawn(seed), 0
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout) and dropout.p:
                number += 1
                module.lora_dropout[name] = DocumentDropout(dropout.p, number, drawn)
    if not number:
        return None
    base = model.get_base_model()
    if base.config.model_type == "phi4flash":
        first = base.model.layers[0]
        if hasattr(first, _HOOK):  # of a stage before
            getattr(first, _HOOK).remove()
        setattr(first, _HOOK, first.register_forward_pre_hook(_lay_out(drawn), with_kwargs=True))
    return drawn


_HOOK = "_lays_out_dropout"


def _lay_out(drawn: Drawn) -> Any:
    def hook(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if layer.training:
            drawn.lay_out(next(value for value in (*given, *named.values()) if isinstance(value, Layout)))

    return hook
