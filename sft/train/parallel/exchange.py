"""Tokens that other ranks hold, fetched in one collective, with a gradient that goes back the same way.

Every rank enters every exchange, in the forward and in the backward pass, even where it wants and gives nothing: which
collectives there are follows from the model alone. Gradients are summed in the order of the ranks, so that the same
input gives the same bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, distributed

from sft.train.parallel.cut import Range, overlaps


@dataclass(frozen=True)
class Ranks:
    """The ranks that share a row: this one's number, from 0, how many, and their process group."""

    rank: int
    size: int
    group: Any = None


@dataclass
class Exchange:
    """Fetches ranges of a row whose parts the ranks hold. `moved`: bytes that came in, by the name of the exchange."""

    ranks: Ranks
    moved: Counter[str] = field(default_factory=Counter)

    def fetch(self, mine: Tensor, parts: Sequence[int], wanted: Sequence[Range], name: str) -> Tensor:
        """The rows `wanted[rank]`, `(m, ...)`, of what the ranks hold together.

        Args:
            mine: `(n, ...)`, this rank's part, contiguous or not.
            parts: `(P + 1,)`, where each rank's part begins and ends; wanted: what each rank wants.
        """
        assert mine.shape[0] == parts[self.ranks.rank + 1] - parts[self.ranks.rank]
        fetched: Tensor = _Fetch.apply(mine, self, _Plan.of(self.ranks, parts, wanted), name)
        return fetched

    def swap(self, sent: Tensor, give: list[int], take: list[int], name: str) -> Tensor:
        """Send `give[r]` rows of `sent` to each rank r and get `take[r]` from it, in the order of the ranks."""
        width = math.prod(sent.shape[1:]) * sent.element_size()
        raw = sent.contiguous().reshape(-1).view(torch.uint8)
        got = raw.new_empty(sum(take) * width)
        # As bytes: gloo knows few types.
        distributed.all_to_all_single(
            got, raw, [n * width for n in take], [n * width for n in give], group=self.ranks.group
        )
        self.moved[name] += (sum(take) - take[self.ranks.rank]) * width
        return got.view(sent.dtype).reshape(sum(take), *sent.shape[1:])


@dataclass(frozen=True)
class _Plan:
    """Which rows of its own part a rank sends to each, and how many it gets from each."""

    give: list[Range]
    take: list[int]

    @classmethod
    def of(cls, ranks: Ranks, parts: Sequence[int], wanted: Sequence[Range]) -> _Plan:
        give = [overlaps(parts, other)[ranks.rank] for other in wanted]
        return cls(give, [last - first for first, last in overlaps(parts, wanted[ranks.rank])])

    @property
    def given(self) -> list[int]:
        return [last - first for first, last in self.give]


class _Fetch(torch.autograd.Function):
    """The exchange, and its transpose: each row's gradients go to the rank that holds it and are added up there."""

    @staticmethod
    def forward(ctx: Any, mine: Tensor, exchange: Exchange, plan: _Plan, name: str) -> Tensor:
        ctx.exchange, ctx.plan, ctx.name, ctx.shape = exchange, plan, name, mine.shape
        sent = torch.cat([mine[first:last] for first, last in plan.give])
        return exchange.swap(sent, plan.given, plan.take, name)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        plan: _Plan = ctx.plan
        parts = ctx.exchange.swap(grad, plan.take, plan.given, ctx.name).split(plan.given)
        # Half-precision gradients of many readers are summed in float32 and rounded once.
        total = grad.new_zeros(ctx.shape, dtype=torch.promote_types(grad.dtype, torch.float32))
        for (first, last), part in zip(plan.give, parts, strict=True):
            total[first:last] += part
        return total.to(grad.dtype), None, None, None
