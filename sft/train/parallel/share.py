"""A rank's share of a packed row, as the model asks it for what went before (`RowShare` in layout_phi4flash.py).

Mamba layers fetch the last tokens before the share for their convolution, and for their scan what the ranks before have
come to: the state at the end of a part, scanned from zero, and the time t that its steps add up to, of which exp(A t)
is the decay (Mamba, arXiv 2312.00752, eq. 2, unrolled). An exclusive prefix over these pairs is the state before the
share, and the scan runs from it. Nothing of this grows with the row's length.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from sambay_kernels import selective_scan
from torch import Tensor

from sft.train.parallel.cut import Range, RowCut
from sft.train.parallel.exchange import Exchange, Ranks


class RowShare:
    """What one rank of several computes of a packed row."""

    def __init__(self, cut: RowCut, ranks: Ranks, exchange: Exchange | None = None) -> None:
        assert cut.ranks == ranks.size
        self.cut, self.ranks, self.exchange = cut, ranks, exchange or Exchange(ranks)
        self._parts = len(cut.borders_of(ranks.rank)) - 1

    def conv_state(self, tokens: Tensor, taps: int) -> Tensor:
        """`(S, D, taps - 1)`: what a causal convolution over the share's tokens `(n, D)` starts from."""
        before = self.exchange.fetch(tokens, self.cut.cuts, self.cut.before(taps - 1), "conv")
        first = F.pad(before.t(), (taps - 1 - before.shape[0], 0))
        return self._of_the_first(first)

    def scan_state(self, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *, delta_bias: Any) -> Tensor:
        """`(S, D, N)`: what the scan of the share starts from; arguments as in `sambay_kernels.selective_scan`."""
        rank, part = self.ranks.rank, self.cut.last_part(self.ranks.rank)
        # On every rank, even of no token at all: each has a part in the collective of the backward pass.
        _, state = selective_scan(u[part:], delta[part:], A, B[part:], C[part:], delta_bias=delta_bias)
        work = state.dtype
        passed = delta if self.cut.passes_through(rank) else delta[:0]
        steps = F.softplus(passed.to(work) + delta_bias.to(work)).sum(0)
        mine = torch.cat([state, steps[None, :, None]], dim=-1)
        reached = self.exchange.fetch(mine, range(self.ranks.size + 1), self.cut.states_before(), "scan")
        before = reached[:0, :, :-1].sum(0)  # zeros that hang on the exchange, wherever the share begins
        for one in reached.unbind(0):
            before = torch.exp(one[:, -1:] * A.to(work)) * before + one[:, :-1]
        return self._of_the_first(before)

    def keys_before(self, keys: Tensor, values: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """The share's keys and values `(n, heads, d)`, with those before it that its first document's queries see."""
        both = torch.stack([keys, values], dim=1)
        before = self.exchange.fetch(both, self.cut.cuts, self._reach(window), "keys" if window is None else "window")
        return torch.cat([before[:, 0], keys]), torch.cat([before[:, 1], values])

    def key_cu_seqlens(self, cu_seqlens: Tensor, window: int | None) -> Tensor:
        """Borders among those keys, of the documents that have the share's own `cu_seqlens`."""
        first, end = self._reach(window)[self.ranks.rank]
        return F.pad(cu_seqlens[1:] + (end - first), (1, 0))

    def _reach(self, window: int | None) -> list[Range]:
        return self.cut.before(None if window is None else window - 1)

    def _of_the_first(self, state: Tensor) -> Tensor:
        """A state of the share's first document, and zeros for the others."""
        return torch.cat([state[None], state.new_zeros(self._parts - 1, *state.shape)])
