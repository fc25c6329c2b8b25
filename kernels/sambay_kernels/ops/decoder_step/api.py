"""A decoding step: which backend runs it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...native.cpp_build import problem
from ...native.cpp_call import SUFFIXES
from ...runtime.dispatch import backend_for, register
from ...triton.launch import DEVICES as TRITON_DEVICES
from ...triton.launch import problem as triton_problem
from .cpp import OP, CppDecoder
from .slots import Slots
from .torch import decoder_step_torch
from .triton import decoder_step_triton
from .weights import DecoderWeights

register(OP, "cpp", ("cpu",), problem, tuple(SUFFIXES))
register(OP, "triton", TRITON_DEVICES, triton_problem)
register(OP, "torch")


class DecoderStep:
    """A model's decoding step, with what a backend keeps of its weights.

    The C++ one packs copies of them, which take as much memory again: make a new one when the weights have changed.
    """

    def __init__(self, weights: DecoderWeights) -> None:
        self.weights = weights
        self.backend = backend_for(OP, weights.embed)
        self._cpp = CppDecoder(weights) if self.backend == "cpp" else None

    @property
    def takes_runs(self) -> bool:
        """Whether several tokens of a sequence cost a step less than as many steps."""
        return self._cpp is not None

    @torch.no_grad()
    def __call__(self, slots: Slots, tokens: Tensor, rows: Tensor, wanted: Tensor | None = None) -> Tensor:
        """R tokens, each the next one of a sequence; several of one sequence follow each other.

        Args:
            slots: CHANGED: states and rings move on, keys and values are written behind the sequence's last ones (the
                table must list the pages for them), lengths grow.
            tokens: (R,) int64.
            rows: (R,) int64, the slot of each token's sequence: once, or several times in a row, the next tokens in
                their order. The Triton backend takes every slot once, and can't tell.
            wanted: (R,) bool, the tokens whose logits are computed; None: all.

        Returns:
            logits (W, vocab) of the wanted tokens, in the type of the weights.

        Raises:
            ValueError: from the C++ backend: tokens, rows or slots that can't be; nothing has changed then. From the
                Triton backend: `wanted`.
        """
        if self._cpp is not None:
            return self._cpp(slots, tokens, rows, wanted)
        if self.backend == "torch":
            return decoder_step_torch(self.weights, slots, tokens, rows, wanted)
        if wanted is not None:
            raise ValueError(f"{OP}: the Triton backend computes the logits of every row; leave out `wanted`")
        return decoder_step_triton(self.weights, slots, tokens, rows)
