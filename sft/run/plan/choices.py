"""What to change: the layouts that a stage could have on a cluster with the same batch, and which of them fit."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sft.run.plan.cards import Cluster
from sft.run.plan.engines import Engine
from sft.run.plan.memory import Layout, RankMemory, rank_memory
from sft.run.plan.ops import PROJECTIONS, Adapters
from sft.run.plan.passes import Recompute
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
            for recompute in dict.fromkeys((layout.recompute, *RECOMPUTED)):
                if engine.zero == 3 and recompute.layers and layout.adapters is not None:
                    continue  # refused: it would need the reentrant form
                other = replace(
                    layout,
                    engine=replace(engine, world=world),
                    rows=rows,
                    accumulation=accumulation,
                    documents=max(rows, layout.documents * rows // layout.rows),
                    recompute=recompute,
                )
                overrides = []
                if other.engine != layout.engine:
                    overrides.append(f"{prefix}.deepspeed {_spelt(other.engine)}")
                if rows != layout.rows:
                    overrides += [f"{prefix}.per_device_train_batch_size {rows}"]
                    overrides += [f"{prefix}.gradient_accumulation_steps {accumulation}"]
                overrides += [f"{prefix}.{words}" for words in _changes(layout.recompute, recompute)]
                if overrides:
                    yield tuple(overrides), other


RECOMPUTED = (Recompute(), Recompute(selective=True), Recompute(offload=True), Recompute(layers=False))
"""Ways to recompute that are tried; nobody needs what offloading leaves to keep attention's results beside it."""


def _changes(before: Recompute, after: Recompute) -> Iterator[str]:
    """Keys of `train`, with their values, that make one of the other."""
    if after.layers != before.layers:
        yield f"gradient_checkpointing {str(after.layers).lower()}"
    if after.selective != before.selective and after.layers:
        yield f"gradient_checkpointing_kwargs.selective {str(after.selective).lower()}"
    if after.offload != before.offload and after.layers:
        yield f"activation_offloading {str(after.offload).lower()}"


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
    room, prefix = cluster.card.usable, f"--stages.{stage.name}.train"
    accumulation, alone = layout.accumulation * layout.rows, Engine(layout.engine.world)
    one_row = {"rows": 1, "documents": max(1, layout.documents // layout.rows), "accumulation": accumulation}
    base = replace(layout, **one_row, recompute=Recompute(offload=True))  # type: ignore[arg-type]
    also = [f"{prefix}.{words}" for words in _changes(layout.recompute, base.recompute)]
    if layout.rows > 1:
        also += [f"{prefix}.per_device_train_batch_size 1", f"{prefix}.gradient_accumulation_steps {accumulation}"]
    plain = [] if layout.engine.zero is None else [f"{prefix}.deepspeed null"]

    def fits(other: Layout) -> bool:
        return rank_memory(shape, other).total <= room

    def told(*words: str) -> str:
        return " ".join([*words, *(word for word in also if word.split()[0] not in " ".join(words))])

    adamw, whole = layout.optimizer.startswith("adamw_torch"), layout.adapters is None
    half = replace(base, weights_width=2, states_width=2, engine=alone)
    if adamw and whole and fits(half):
        keys = [f"{prefix}.weights_dtype bfloat16", f"{prefix}.optim_state_dtype bfloat16"]
        yield told(*keys, *plain)
    if adamw and fits(replace(base, optimizer="paged_adamw_8bit", engine=replace(layout.engine, zero=None))):
        yield told(f"{prefix}.optim paged_adamw_8bit", *plain)
    if whole and fits(replace(base, adapters=Adapters(64, frozenset(PROJECTIONS)), engine=alone)):
        yield told(f"{prefix}.use_peft true", f"{prefix}.lora_r 64", f"{prefix}.lora_dropout 0.0", *plain)
    yield from _shorter_rows(base, told, fits, prefix)
    for cards in (2, 4, 8, 16, 32, 64):
        if cards > cluster.count and fits(replace(base, engine=_zero3(cards))):
            yield told(f"--gpus {cards}x{cluster.card.name}", f"{prefix}.deepspeed zero3")
            break


def _shorter_rows(base: Layout, told: Callable[..., str], fits: Callable[[Layout], bool], prefix: str) -> Iterator[str]:
    """Rows that several ranks share, and shorter ones: the least of either that fits."""
    world, own = base.engine.world, base.engine
    shared = [size for size in (2, 4, 8) if size > base.sharing and world % size == 0 == size % base.sharing]
    parted = [own] if own.zero == 3 or base.adapters is not None else [own, _zero3(world)]
    for engine, size in ((engine, size) for engine in parted for size in shared):
        more = base.accumulation * size // base.sharing
        if fits(replace(base, sharing=size, accumulation=more, engine=engine)):
            words = [f"{prefix}.sequence_parallel_size {size}", f"{prefix}.gradient_accumulation_steps {more}"]
            yield told(*words, *([] if engine is own else [f"{prefix}.deepspeed zero3"]))
            break
    length = 1 << (base.length - 1).bit_length() - 1
    while length >= 1024:
        if fits(replace(base, length=length, documents=max(1, base.documents * length // base.length))):
            yield told(f"{prefix}.max_length {length}")
            break
        length //= 2
