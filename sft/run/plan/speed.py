"""How long a step takes: what there is to multiply and to move, over what a card reaches."""

from __future__ import annotations

from dataclasses import dataclass

from sft.run.plan import cards
from sft.run.plan.cards import Cluster
from sft.run.plan.memory import Layout, trained_values
from sft.run.plan.shape import FLOAT32, Shape

WAITING = {True: 0.5, False: 0.8}
"""The share of the time that ranks compute, where rows aren't packed and each waits for the longest: by whether they
meet after every micro-batch (ZeRO-2 and 3) or once a step (simulated on lengths of reasoning traces)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step: `computing` on a rank, `waiting` for others and their gradients, `updating`."""

    computing: float
    waiting: float
    updating: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.computing + self.waiting + self.updating


def product_flops(shape: Shape, layout: Layout) -> float:
    """Of the linear layers of a micro-batch of a rank, forward, backward and again where layers are checkpointed."""
    tokens, kept, supervised = layout.tokens, layout.tokens * layout.kept, layout.tokens * layout.supervised
    forward = 0.0
    for matrix in shape.matrices():
        whole = matrix.layer < shape.shared_layer or (matrix.layer == shape.shared_layer and matrix.name == "Wqkv")
        forward += 2 * matrix.numel * (tokens if whole else kept)
    of_weights = 1 if layout.adapters is None else 0
    adapters = 0.0 if layout.adapters is None else 6.0 * trained_values(shape, layout.adapters) * tokens
    passes = 1 + 1 + of_weights + layout.checkpointing
    return (passes * forward + adapters + (2 + of_weights) * 2 * shape.embedding * supervised) / layout.sharing


def attention_flops(shape: Shape, layout: Layout) -> float:
    """Of all pairs that attention looks at in a micro-batch: 3 products of a head's width forward, 7 backward."""
    length, share = layout.tokens / layout.documents, layout.kept
    window = min(shape.sliding_window, length)
    near = layout.tokens * (window - window * (window - 1) / (2 * length))
    # The kept are the documents' last: the first (1 - share) of the queries aren't asked.
    far = layout.tokens * length / 2 * (1 - (1 - share) ** 2)
    windows = shape.memory_layer // 2
    again, far_again = layout.checkpointing, layout.checkpointing and not layout.recompute.selective
    windows_work = windows * near * (20 + 6 * again)
    whole_work = (shape.num_hidden_layers // 2 - windows) * far * (20 + 6 * far_again)
    return shape.hidden_size * (windows_work + whole_work) / layout.sharing


def step_time(shape: Shape, layout: Layout, cluster: Cluster) -> StepTime:
    """Of a step on `cluster`, whose card has to be one."""
    card = cluster.card
    assert card is not None
    rate = card.flops if layout.bf16 else card.flops / 8
    micro = product_flops(shape, layout) / (rate * cards.PRODUCT_SHARE)
    micro += attention_flops(shape, layout) / (rate * cards.ATTENTION_SHARE)
    computing = micro * layout.accumulation
    trained = trained_values(shape, layout.adapters)
    own = trained if layout.engine.zero in (None, 0) else trained / layout.engine.world
    updating = 7 * FLOAT32 * own / (card.bandwidth * cards.STREAM_SHARE)
    if layout.engine.offload_optimizer:
        updating = 5 * FLOAT32 * trained / layout.engine.world / HOST_RATE
    return StepTime(computing, _waiting(shape, layout, cluster, computing, trained), updating)


HOST_RATE = 20e9
"""Bytes a second over PCIe and of AdamW on a host's processor (ours)."""


def _waiting(shape: Shape, layout: Layout, cluster: Cluster, computing: float, trained: int) -> float:
    """Seconds that collectives take beyond what computation hides, and that ranks wait for the longest row."""
    engine = layout.engine
    if engine.world == 1:
        return 0.0
    share = (engine.world - 1) / engine.world
    gradients, weights = trained * FLOAT32 * share, 0.0
    if engine.zero == 3:
        held = trained * FLOAT32 if layout.adapters is None else shape.parameters * layout.frozen_width
        weights = held * share * (2 + layout.checkpointing) * layout.accumulation
    if engine.zero in (2, 3):
        moved = gradients * layout.accumulation + (gradients if engine.zero == 2 else 0)
    else:
        moved = 2 * gradients
    seconds = (moved + weights) / cluster.link
    waiting = max(0.0, seconds - cards.HIDDEN * computing)
    if layout.documents == layout.rows:  # not packed
        waiting += computing * (1 / WAITING[engine.zero in (2, 3)] - 1)
    return waiting
