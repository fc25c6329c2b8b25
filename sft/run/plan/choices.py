"""What to change: the layouts that a stage could have on a cluster with the same batch, and which of them fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sft.recipe.optimizer_keys import ROUNDED
from sft.run.plan.cards import Cluster
from sft.run.plan.engines import Engine
from sft.run.plan.memory import Layout, RankMemory, rank_memory
from sft.run.plan.ops import PROJECTIONS, Adapters
from sft.run.plan.passes import Recompute
from sft.run.plan.shape import FLOAT32, Shape
from sft.run.plan.speed import step_time

if TYPE_CHECKING:
    from sft.recipe.schema import Stage

WORTH = 0.97
"""A layout is told as faster where it takes less than this share of the recipe's step."""


@dataclass(frozen=True)
class Choice:
    """Another layout: what to put on the command line for it, what it takes, and how long its step is."""

    overrides: tuple[str, ...]
    layout: Layout
    memory: RankMemory
    seconds: float

    @property
    def words(self) -> str:
        """The overrides, as they are typed."""
        return " ".join(self.overrides)


def choices(
    stage: Stage, shape: Shape, layout: Layout, cluster: Cluster
) -> tuple[Choice | None, Choice | None, list[str]]:
    """The smallest change that makes a stage fit (None: it fits as it is, or none does), the fastest layout that fits
    (None: the recipe's is), and, where none fits, what else would help."""
    assert cluster.card is not None
    room, own = cluster.card.usable, rank_memory(shape, layout)
    fits = own.total <= room
    found = [
        Choice(overrides, other, memory, step_time(shape, other, cluster).seconds)
        for overrides, other in _others(stage, layout)
        if (memory := rank_memory(shape, other)).total <= room
    ]
    fastest = min(found, key=lambda choice: (choice.seconds, len(choice.overrides)), default=None)
    if fits and fastest is not None and fastest.seconds > WORTH * step_time(shape, layout, cluster).seconds:
        fastest = None
    if fits:
        return None, fastest, []
    smallest = min(found, key=lambda choice: (len(choice.overrides), choice.seconds), default=None)
    if smallest is not None and fastest is not None and fastest.layout == smallest.layout:
        fastest = None
    return smallest, fastest, [] if found else list(_remedies(stage, shape, layout, cluster))


def may_be(stage: Stage, layout: Layout) -> bool:
    """Whether the checks of the recipe and of the trainer let a stage train so: what they refuse isn't proposed."""
    zero, adapters = layout.engine.zero, layout.adapters is not None
    half = layout.weights_width != FLOAT32
    refused = (
        zero is not None and (half or layout.optimizer == "muon" or stage.train.use_cpu),
        zero == 3 and (layout.ema or layout.four_bit),
        zero == 3 and adapters and layout.recompute.layers,  # it would need the reentrant form
        half and (adapters or not layout.bf16 or layout.optimizer not in ROUNDED),
        adapters and (layout.ema or stage.average is not None),
        layout.sharing > 1 and stage.train.neftune_noise_alpha is not None,
        layout.engine.world % layout.sharing > 0,
    )
    return not any(refused)


def _others(stage: Stage, layout: Layout) -> Iterator[tuple[tuple[str, ...], Layout]]:
    """Layouts of the same batch that this recipe may have."""
    for engine in _engines(stage, layout):
        for rows, accumulation in _splits(layout):
            for recompute in dict.fromkeys((layout.recompute, *RECOMPUTED)):
                other = replace(
                    layout,
                    engine=engine,
                    rows=rows,
                    accumulation=accumulation,
                    documents=max(rows, layout.documents * rows // layout.rows),
                    recompute=recompute,
                )
                overrides = tuple(_overrides(stage, layout, other))
                if overrides and may_be(stage, other):
                    yield overrides, other


def _overrides(stage: Stage, before: Layout, after: Layout) -> Iterator[str]:
    """What makes one layout of the other, as it is typed; but for the cards."""
    for key, value in _changes(before, after):
        yield f"--stages.{stage.name}.train.{key} {value}"


def _changes(before: Layout, after: Layout) -> Iterator[tuple[str, object]]:
    """Keys of `train`, with their values, that make one of the other."""
    if after.optimizer != before.optimizer:
        yield "optim", after.optimizer
    for key, old, new in (
        ("weights_dtype", before.weights_width, after.weights_width),
        ("optim_state_dtype", before.states_width, after.states_width),
    ):
        if old != new:
            yield key, "float32" if new == FLOAT32 else "bfloat16"
    if after.adapters is not None and before.adapters is None:
        yield from (("use_peft", "true"), ("lora_r", after.adapters.rank), ("lora_dropout", after.adapters.dropout))
    if after.sharing != before.sharing:
        yield "sequence_parallel_size", after.sharing
    if after.length != before.length:
        yield "max_length", after.length
    if _kind(after.engine) != _kind(before.engine):
        yield "deepspeed", _spelt(after.engine)
    if after.rows != before.rows:
        yield "per_device_train_batch_size", after.rows
    if after.accumulation != before.accumulation:
        yield "gradient_accumulation_steps", after.accumulation
    yield from _recomputed(before.recompute, after.recompute)


RECOMPUTED = (Recompute(), Recompute(selective=True), Recompute(offload=True), Recompute(layers=False))
"""Ways to recompute that are tried; nobody needs what offloading leaves to keep attention's results beside it."""


def _recomputed(before: Recompute, after: Recompute) -> Iterator[tuple[str, object]]:
    if after.layers != before.layers:
        yield "gradient_checkpointing", str(after.layers).lower()
    if after.selective != before.selective:  # what is left standing beside no recomputation is refused
        yield "gradient_checkpointing_kwargs.selective", str(after.selective).lower()
    if after.offload != before.offload and after.layers:
        yield "activation_offloading", str(after.offload).lower()


def _engines(stage: Stage, layout: Layout) -> Iterator[Engine]:
    own, world = layout.engine, layout.engine.world
    yield own
    plain = [Engine(world)]
    if world > 1:
        plain += [Engine(world, 1), Engine(world, 2)]
    plain.append(Engine(world, 2, offload_optimizer=True, buckets=1))
    if world > 1:
        plain += [_zero3(world), replace(_zero3(world), offload_optimizer=True)]
    for engine in plain:
        same = (engine.zero, engine.offload_optimizer) == (own.zero, own.offload_optimizer)
        if same or (engine.offload_optimizer and not stage.train.optim.startswith("adamw_torch")):
            continue  # DeepSpeed's host has an AdamW alone
        yield engine


_AUTO = 2560**2
"""A reduction's buffer of ZeRO-3, which follows from the model's width and is small."""


def _zero3(world: int) -> Engine:
    return Engine(world, 3, bucket=_AUTO, buckets=1)


def _splits(layout: Layout) -> list[tuple[int, int]]:
    """Micro-batches of the same rows a step: as it is, one row at a time, and half and twice as many."""
    every = layout.rows * layout.accumulation
    wanted = {layout.rows, 1, max(1, layout.rows // 2), 2 * layout.rows}
    return [(rows, every // rows) for rows in sorted(wanted) if every % rows == 0]


def _kind(engine: Engine) -> tuple[int | None, bool, bool]:
    return engine.zero, engine.offload_optimizer, engine.offload_parameters


def _spelt(engine: Engine) -> str:
    if engine.zero is None:
        return "null"
    if not engine.offload_optimizer:
        return f"zero{engine.zero}"
    content = {"zero_optimization": {"stage": engine.zero, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    return f"'{json.dumps(content)}'"


def _remedies(stage: Stage, shape: Shape, layout: Layout, cluster: Cluster) -> Iterator[str]:
    """What helps where no layout does: it changes what is trained or how it is rounded, or needs more cards."""
    assert cluster.card is not None
    for others in _remedied(stage, layout):
        for other in others:
            if may_be(stage, other) and rank_memory(shape, other).total <= cluster.card.usable:
                cards = other.engine.world
                told = [] if cards == cluster.count else [f"--gpus {cards}x{cluster.card.name}"]
                yield " ".join([*told, *_overrides(stage, layout, other)])
                break


def _remedied(stage: Stage, layout: Layout) -> Iterator[Iterator[Layout]]:
    """Layouts of each kind of remedy, the least change first."""
    alone, documents = Engine(layout.engine.world), max(1, layout.documents // layout.rows)
    every = layout.rows * layout.accumulation
    base = replace(layout, rows=1, documents=documents, accumulation=every, recompute=Recompute(offload=True))
    if not may_be(stage, base):
        base = replace(base, engine=alone)  # adapters under ZeRO-3, of whose layers none is computed again
    full = replace(base, weights_width=FLOAT32, states_width=FLOAT32)
    yield iter([replace(base, weights_width=2, states_width=2, engine=alone)])
    if layout.optimizer.startswith("adamw_torch"):
        yield iter([replace(full, optimizer="paged_adamw_8bit", engine=alone)])
    if layout.adapters is None:
        yield iter([replace(full, adapters=Adapters(64, frozenset(PROJECTIONS)), engine=alone)])
    yield _shared(base)
    yield _shorter(base)
    yield _on_more_cards(full)


def _shared(base: Layout) -> Iterator[Layout]:
    """Rows that several ranks share."""
    own, world = base.engine, base.engine.world
    for engine in [own] if own.zero == 3 else [own, _zero3(world)]:
        for size in (2, 4, 8):
            if size > base.sharing and world % size == 0 == size % base.sharing:
                more = base.accumulation * size // base.sharing
                yield replace(base, sharing=size, accumulation=more, engine=engine)


def _shorter(base: Layout) -> Iterator[Layout]:
    """Shorter rows."""
    length = 1 << (base.length - 1).bit_length() - 1
    while length >= 1024:
        yield replace(base, length=length, documents=max(1, base.documents * length // base.length))
        length //= 2


def _on_more_cards(base: Layout) -> Iterator[Layout]:
    """Weights that more ranks hold a part of; where they can't be parted, the optimizer's state alone is."""
    own = base.engine
    for cards in (2, 4, 8, 16, 32, 64):
        if cards > own.world:
            yield replace(base, engine=replace(own, world=cards) if own.zero == 3 else _zero3(cards))
            yield replace(base, engine=replace(own, world=cards) if own.zero == 2 else Engine(cards, 2))
