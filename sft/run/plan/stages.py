"""A recipe's stages, planned: the layout that the recipe asks for, its memory, time and disk, and what to change."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sft.recipe.paths import RunPaths
from sft.run.plan.answers import SuitePlan, suite_plans
from sft.run.plan.cards import Cluster
from sft.run.plan.choices import Choice, choices
from sft.run.plan.config import shape_of
from sft.run.plan.disk import DiskPlan, disk_plan
from sft.run.plan.engines import engine_of
from sft.run.plan.memory import Layout, RankMemory, rank_memory
from sft.run.plan.ops import PROJECTIONS, Adapters
from sft.run.plan.passes import Recompute
from sft.run.plan.rows import Rows, Told, rows_of
from sft.run.plan.shape import FLOAT32, Shape
from sft.run.plan.speed import StepTime, step_time
from sft.utils.errors import UsageError

if TYPE_CHECKING:
    from sft.recipe.schema import Recipe, Stage

UNTOLD = Told()
WIDTHS = {"float32": FLOAT32, "bfloat16": 2}
UNBOUNDED = 32768
"""Tokens of a row where the recipe sets no limit."""


@dataclass(frozen=True)
class StagePlan:
    """A stage on a cluster. `fits`: None on a processor, whose memory is the machine's; `step`: None there, too.

    Attributes:
        steps, tokens, hours: of the whole stage; None where its rows aren't known.
        smallest: the change of fewest keys that makes it fit, where it doesn't. fastest: the fastest that fits.
    """

    name: str
    layout: Layout
    rows: Rows
    memory: RankMemory
    fits: bool | None
    step: StepTime | None
    steps: int | None
    tokens: int | None
    disk: DiskPlan
    suites: list[SuitePlan]
    smallest: Choice | None
    fastest: Choice | None
    remedies: list[str]

    @property
    def tokens_of_a_step(self) -> int:
        """Of all ranks, in full rows."""
        return self.layout.rows_of_a_step * self.layout.length

    @property
    def hours(self) -> float | None:
        """Of training."""
        return None if self.step is None or self.steps is None else self.step.seconds * self.steps / 3600


def plan_recipe(recipe: Recipe, cluster: Cluster, only: str | None = None, told: Told = UNTOLD) -> list[StagePlan]:
    """Plan the stages, or the one of this name. `told`: of stages that aren't prepared.

    Raises UserError for a model that isn't SambaY or whose configuration isn't at hand.
    """
    shape = shape_of(recipe.model)
    plans = []
    for number, stage in enumerate(recipe.stages):
        if only in (None, stage.name):
            plans.append(_stage(recipe, number, stage, shape, cluster, told))
    return plans


def _stage(recipe: Recipe, number: int, stage: Stage, shape: Shape, cluster: Cluster, told: Told) -> StagePlan:
    rows = rows_of(RunPaths(recipe), stage, told)
    layout = layout_of(recipe, stage, shape, cluster, rows)
    memory = rank_memory(shape, layout)
    epoch = _steps_of_an_epoch(stage, layout, rows)
    steps = _steps(stage, epoch)
    tokens = None if steps is None else _tokens(stage, layout, rows, steps)
    fits = step = smallest = fastest = None
    remedies: list[str] = []
    if cluster.card is not None:
        fits, step = memory.total <= cluster.card.usable, step_time(shape, layout, cluster)
        smallest, fastest, remedies = choices(stage, shape, layout, cluster)
    train = stage.train
    saves = _saves(stage, steps, epoch)
    stored = 2 if recipe.model.dtype == "bfloat16" else FLOAT32
    disk = disk_plan(shape, layout, limit=train.save_total_limit, saves=saves, stored_width=stored)
    suites = suite_plans(number, stage, cluster, shape, steps)
    return StagePlan(
        stage.name, layout, rows, memory, fits, step, steps, tokens, disk, suites, smallest, fastest, remedies
    )


def layout_of(recipe: Recipe, stage: Stage, shape: Shape, cluster: Cluster, rows: Rows) -> Layout:
    """How the recipe has a stage trained on a cluster. Raises UsageError where its ranks can't share rows as asked."""
    train, gpu, where = stage.train, cluster.card is not None, f"stages[{stage.name}].train"
    _check_shares(train.sequence_parallel_size, cluster, where)
    length = train.max_length or UNBOUNDED
    count = train.per_device_train_batch_size
    document = min(float(length), rows.document or length)
    documents = max(count, round(count * length / document)) if train.packing else count
    half = train.weights_dtype == "bfloat16"
    adapters = None
    if train.use_peft:
        targets = train.lora_target_modules
        named = targets if isinstance(targets, list) else PROJECTIONS
        kinds = frozenset(name.rpartition(".")[2] for name in named) - ({"dt_proj"} if train.use_dora else set())
        adapters = Adapters(train.lora_r, kinds, train.lora_dropout, train.use_dora)
    again = gpu if train.gradient_checkpointing is None else train.gradient_checkpointing
    return Layout(
        engine_of(train.deepspeed_content(), cluster.count, shape, where),
        count,
        length,
        documents,
        train.gradient_accumulation_steps,
        Recompute(again, again and train.selective, again and train.activation_offloading),
        gpu or half if train.bf16 is None else train.bf16,
        train.optim,
        train.optim_args,
        adapters,
        2 if gpu and recipe.model.dtype == "bfloat16" else FLOAT32,
        recipe.model.load_in_4bit,
        train.ema is not None,
        supervised=1.0,
        device="gpu" if gpu else "cpu",
        weights_width=WIDTHS[train.weights_dtype],
        states_width=WIDTHS[train.optim_state_dtype],
        sharing=train.sequence_parallel_size,
    )


def _check_shares(size: int, cluster: Cluster, where: str) -> None:
    """Refuse ranks that groups of this size don't part, as the trainer does."""
    if cluster.count % size == 0:
        return
    shared = f"{where}.sequence_parallel_size: {size} processes share a row"
    if cluster.card is None:
        raise UsageError(f"{shared}, and --gpus cpu plans one process: name {size} cards (--gpus), or leave it out.")
    enough = Cluster(size * math.ceil(cluster.count / size), cluster.card)
    raise UsageError(f"{shared}, and {cluster} is no multiple of that: plan for {enough} (--gpus), or lower it.")


def _rows_of_an_epoch(stage: Stage, layout: Layout, rows: int) -> int:
    """Rows that are trained of an epoch's."""
    batch = layout.rows_of_a_step // layout.accumulation
    return rows - rows % batch if stage.train.dataloader_drop_last else rows


def _steps_of_an_epoch(stage: Stage, layout: Layout, rows: Rows) -> int | None:
    """As the trainer counts them; None where nobody knows the rows."""
    if rows.rows is None:
        return None
    return max(1, math.ceil(_rows_of_an_epoch(stage, layout, rows.rows) / layout.rows_of_a_step))


def _steps(stage: Stage, epoch: int | None) -> int | None:
    """Of the stage; `epoch`: those of an epoch."""
    if stage.train.max_steps > 0:
        return stage.train.max_steps
    return None if epoch is None else math.ceil(epoch * stage.train.num_train_epochs)


def _tokens(stage: Stage, layout: Layout, rows: Rows, steps: int) -> int:
    """Of so many steps, an epoch's last as full as the rows make it; of full rows where nobody knows them."""
    epoch = _steps_of_an_epoch(stage, layout, rows)
    if epoch is None or not rows.rows or rows.tokens is None:
        return steps * layout.rows_of_a_step * layout.length
    every = _rows_of_an_epoch(stage, layout, rows.rows)
    epochs, more = divmod(steps, epoch)
    trained = epochs * every + min(more * layout.rows_of_a_step, every)
    return round(trained * rows.tokens / rows.rows)


def _saves(stage: Stage, steps: int | None, epoch: int | None) -> int | None:
    """How many checkpoints are written in all: the last is the last step's."""
    train = stage.train
    if train.save_strategy == "no":
        return 1  # of the last step, from which the stage's result is made
    if train.save_strategy == "epoch":
        if train.max_steps < 1:
            return math.ceil(train.num_train_epochs)
        return None if steps is None or epoch is None else math.ceil(steps / epoch)
    if steps is None:
        return None
    every = train.save_steps if train.save_steps >= 1 else math.ceil(steps * train.save_steps)
    return math.ceil(steps / every)
