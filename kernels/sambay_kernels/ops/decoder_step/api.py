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

    @torch.no_grad()
    def __call__(self, slots: Slots, tokens: Tensor, rows: Tensor) -> Tensor:
        """One token of each of R sequences.

        Args:
            slots: CHANGED: states and rings move on, keys and values are written behind the sequence's last ones (the
                table must list the page for it), lengths grow by one.
            tokens: (R,) int64.
            rows: (R,) int64, the slot of each sequence, none twice.

        Returns:
            logits (R, vocab) in the type of the weights.

        Raises:
            ValueError: from the C++ backend: tokens, rows or slots that can't be. Nothing has changed then.
        """
        if self._cpp is not None:
            return self._cpp(slots, tokens, rows)
        run = decoder_step_triton if self.backend == "triton" else decoder_step_torch
        return run(self.weights, slots, tokens, rows)
