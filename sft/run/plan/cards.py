"""Cards that a run can be planned for: their published rates, and the shares of them that were measured."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sft.recipe.problems import nearest
from sft.utils.errors import UsageError

GIB = 1 << 30
NODE = 8
"""Cards of a machine."""


@dataclass(frozen=True)
class Card:
    """A card by its data sheet.

    Attributes:
        flops: dense bfloat16 products a second. bandwidth: bytes a second of its memory. memory: bytes of it.
        link: bytes a second to the other cards of its machine, in one direction. network: its share of what leaves
            the machine (ours: one 200 or 400 Gbit/s adapter a card where there is NVLink).
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    link: float
    network: float

    @property
    def usable(self) -> int:
        """Bytes that a plan may fill: without what the driver takes, and a share that the allocator can't join."""
        return round((self.memory - RESERVED) * (1 - FRAGMENTED))


RESERVED = GIB
"""Of a GPU's memory, for the driver's context and the libraries' handles (ours, from what CUDA takes at start)."""
FRAGMENTED = 0.04
"""Of what is left, lost between blocks of torch's allocator (ours)."""

CARDS = {
    card.name: card
    for card in (
        Card("A100-40", 312e12, 1.555e12, 40 * GIB, 300e9, 25e9),
        Card("A100-80", 312e12, 2.039e12, 80 * GIB, 300e9, 25e9),
        Card("H100-80", 989e12, 3.35e12, 80 * GIB, 450e9, 50e9),
        Card("H200-141", 989e12, 4.8e12, 140 * GIB, 450e9, 50e9),
        Card("B200-180", 2250e12, 8.0e12, 179 * GIB, 900e9, 50e9),
        Card("L40S-48", 362e12, 0.864e12, 45 * GIB, 32e9, 12.5e9),
        Card("RTX4090-24", 165e12, 1.008e12, 24 * GIB, 32e9, 12.5e9),
    )
}
"""NVIDIA's data sheets: dense rates with float32 sums; memory as the driver tells it."""

PRODUCT_SHARE, ATTENTION_SHARE = 0.539, 0.277
"""Of the card's rate that linear layers (with all between them) and attention reach: from two measured steps of the
published size on an H100, of 8 documents and of 1 (kernels/benchmarks/results/published-step.json)."""
STREAM_SHARE = 0.7
"""Of the memory's bandwidth that an optimizer's step reaches (ours)."""
WEIGHT_SHARE, PAGE_SHARE = 0.497, 0.85
"""Of the memory's bandwidth that decoding reaches reading weights, and keys and values: measured on an H200 at 1 and
16 sequences (kernels/benchmarks/results/published-decode.json)."""
LINK_SHARE, HIDDEN = 0.75, 0.5
"""Of a link's rate that collectives reach, and the share of a step's computation that they can hide behind (ours)."""


@dataclass(frozen=True)
class Cluster:
    """So many of a card; None: this machine's processor, whose speed isn't known."""

    count: int
    card: Card | None

    def __str__(self) -> str:
        return f"{self.count}x{self.card.name}" if self.card else "this machine's processor"

    @property
    def link(self) -> float:
        """Bytes a second between ranks, a rank's share where machines are involved."""
        assert self.card is not None
        return (self.card.network if self.count > NODE else self.card.link) * LINK_SHARE


def cluster_of(text: str) -> Cluster:
    """`8xA100-80`, `H100-80` or `cpu`. Raises UsageError with the cards that are known."""
    if text.lower() == "cpu":
        return Cluster(1, None)
    found = re.fullmatch(r"(?:(\d+)\s*[x*])?\s*(\S+)", text.strip(), re.IGNORECASE)
    count, name = (int(found[1] or 1), found[2]) if found else (0, text)
    known = {card.lower(): card for card in CARDS}
    if name.lower() not in known or count < 1:
        hint = nearest(name, CARDS) or ""
        raise UsageError(
            f"--gpus: {text!r} is no number of a known card, such as 8xA100-80{hint}; {', '.join(CARDS)}, cpu"
        )
    return Cluster(count, CARDS[known[name.lower()]])
