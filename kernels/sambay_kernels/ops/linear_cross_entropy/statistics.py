"""Token accuracy and entropy as a by-product of the loss: taken from the logits that it has in hand anyway."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .tally import LceTally

_open: list[LceTally] = []


@contextmanager
def token_statistics() -> Iterator[LceTally]:
    """Inside, each `linear_cross_entropy` notes what it sees of its supervised tokens, in the order of its labels.

    `correct`: tensors (n,) bool, where no token is likelier than the label; `entropy`: tensors (n,), that of the
    predicted distribution in nats, float32 (float64 if an input is). One of each for every chunk of tokens, on the
    inputs' device, without a gradient. A side channel and no result, so that models, wrappers and engines between the
    caller and the loss need not hand it through. The loss and its gradients stay the same, bit for bit.
    """
    tally = LceTally()
    _open.append(tally)
    try:
        yield tally
    finally:
        _open.remove(tally)


def open_tally() -> LceTally | None:
    """Where to note them; None where nobody asks."""
    return _open[-1] if _open else None
