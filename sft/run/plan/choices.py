"""What to change: the layouts that a stage could have on a cluster with the same batch, and which of them fit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sft.run.plan.cards import Cluster
from sft.run.plan.engines import Engine
from sft.run.plan.memory import Layout, RankMemory, rank_memory
from sft.run.plan.ops import PROJECTIONS, Adapters
from sft.run.plan.shape import Shape
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


def _others(stage: Stage, layout: Layout) -> Iterator[tuple[tuple[str, ...], Layout]]:
    """Layouts of the same batch that this recipe may have."""
    prefix, world = f"--stages.{stage.name}.train", layout.engine.world
    for engine in _engines(stage, layout):
        for rows, accumulation in _splits(layout):
            for checkpointing in (True, False):
                if engine.zero == 3 and checkpointing and layout.adapters is not None:
                    continue  # refused: it would need the reentrant form
                other = replace(
                    layout,
                    engine=replace(engine, world=world),
                    rows=rows,
                    accumulation=accumulation,
                    documents=max(rows, layout.documents * rows // layout.rows),
                    checkpointing=checkpointing,
                )
                overrides = []
                if other.engine != layout.engine:
                    overrides.append(f"{prefix}.deepspeed {_spelt(other.engine)}")
                if rows != layout.rows:
                    overrides += [f"{prefix}.per_device_train_batch_size {rows}"]
                    overrides += [f"{prefix}.gradient_accumulation_steps {accumulation}"]
                if checkpointing != layout.checkpointing:
                    overrides.append(f"{prefix}.gradient_checkpointing {str(checkpointing).lower()}")
                if overrides:
                    yield tuple(overrides), other


def _engines(stage: Stage, layout: Layout) -> Iterator[Engine]:
    yield layout.engine
    if stage.train.optim == "muon":
        return
    own, world = layout.engine, layout.engine.world
    plain = [Engine(world)]
    if world > 1:
        plain += [Engine(world, 1), Engine(world, 2)]
    plain.append(Engine(world, 2, offload_optimizer=True, buckets=1))
    if world > 1 and not layout.four_bit and not layout.ema:
        plain += [Engine(world, 3, bucket=_AUTO, buckets=1), Engine(world, 3, True, bucket=_AUTO, buckets=1)]
    for engine in plain:
        same = (engine.zero, engine.offload_optimizer) == (own.zero, own.offload_optimizer)
        if same or (engine.offload_optimizer and not stage.train.optim.startswith("adamw_torch")):
            continue  # DeepSpeed's host has an AdamW alone
        yield engine


_AUTO = 2560**2
"""A reduction's buffer of ZeRO-3, which follows from the model's width and is small."""


def _splits(layout: Layout) -> list[tuple[int, int]]:
    """Micro-batches of the same rows a step: as it is, one row at a time, and half and twice as many."""
    every = layout.rows * layout.accumulation
    wanted = {layout.rows, 1, max(1, layout.rows // 2), 2 * layout.rows}
    return [(rows, every // rows) for rows in sorted(wanted) if every % rows == 0]


def _spelt(engine: Engine) -> str:
    if engine.zero is None:
        return "null"
    if not engine.offload_optimizer:
        return f"zero{engine.zero}"
    content = {"zero_optimization": {"stage": engine.zero, "offload_optimizer": {"device": "cpu", "pin_memory": True}}}
    return f"'{json.dumps(content)}'"


def _remedies(stage: Stage, shape: Shape, layout: Layout, cluster: Cluster) -> Iterator[str]:
    """What helps where no layout does: it changes what is trained, or needs more cards."""
    assert cluster.card is not None
    room, prefix = cluster.card.usable, f"--stages.{stage.name}.train"
    base = replace(layout, rows=1, documents=max(1, layout.documents // layout.rows), checkpointing=True)
    eight = replace(base, optimizer="paged_adamw_8bit", engine=replace(layout.engine, zero=None))
    if layout.optimizer.startswith("adamw_torch") and rank_memory(shape, eight).total <= room:
        yield f"{prefix}.optim paged_adamw_8bit {prefix}.deepspeed null"
    if layout.adapters is None:
        lora = replace(base, adapters=Adapters(64, frozenset(PROJECTIONS)), engine=Engine(layout.engine.world))
        if rank_memory(shape, lora).total <= room:
            yield f"{prefix}.use_peft true {prefix}.lora_r 64 {prefix}.deepspeed null"
    for length in range(layout.length // 2048 * 1024, 1023, -1024):
        shorter = replace(base, length=length, documents=max(1, base.documents * length // layout.length))
        if length & (length - 1) == 0 and rank_memory(shape, shorter).total <= room:
            yield f"{prefix}.max_length {length}"
            break
    for cards in (2, 4, 8, 16, 32, 64):
        if cards > cluster.count:
            parted = replace(base, engine=Engine(cards, 3, bucket=_AUTO, buckets=1))
            if rank_memory(shape, parted).total <= room:
                yield f"--gpus {cards}x{cluster.card.name} {prefix}.deepspeed zero3"
                break
