"""What a rank holds of weights, gradients and optimizer by engine: one process, DDP, DeepSpeed's ZeRO 1 to 3, offload.

DeepSpeed trains float32 masters here (sft.train.engine), so it keeps no second copy in 16 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sft.run.plan.shape import FLOAT32, Shape
from sft.utils.errors import UsageError

BUCKET = 500_000_000
"""DeepSpeed's reduce_bucket_size, in values."""
LIVE = 1_000_000_000
"""stage3_max_live_parameters: values that ZeRO-3 holds whole at once."""


@dataclass(frozen=True)
class Engine:
    """How a stage is spread over `world` ranks.

    Attributes:
        zero: DeepSpeed's stage, None without DeepSpeed.
        offload_optimizer, offload_parameters: to the host's memory.
        bucket, buckets: values of a reduction's buffer, and how many there are.
    """

    world: int = 1
    zero: int | None = None
    offload_optimizer: bool = False
    offload_parameters: bool = False
    bucket: int = BUCKET
    buckets: int = 2

    @property
    def name(self) -> str:
        """For people."""
        if self.zero is None:
            return "DDP" if self.world > 1 else "one process"
        offload = [
            word for word, on in (("optimizer", self.offload_optimizer), ("weights", self.offload_parameters)) if on
        ]
        return f"ZeRO-{self.zero}" + (f", {' and '.join(offload)} on the host" if offload else "")

    @property
    def keeps_gradients(self) -> bool:
        """Whether a rank holds every gradient whole until the step."""
        return self.zero in (None, 0, 1)

    @property
    def short(self) -> str | None:
        """As `train.deepspeed` has it; None: without."""
        return None if self.zero is None else f"zero{self.zero}"


def engine_of(settings: Any, world: int, shape: Shape, where: str) -> Engine:
    """From the content of `train.deepspeed` (None: DDP). Raises UsageError for what is no such content."""
    if settings is None:
        return Engine(world)
    if not isinstance(settings, Mapping):
        raise UsageError(f"{where}.deepspeed: {settings} holds no JSON object.")
    zero = settings.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UsageError(f"{where}.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3.")
    bucket = zero.get("reduce_bucket_size", BUCKET)
    overlap = zero.get("overlap_comm", stage == 3)
    made = Engine(world, stage, bucket=_values(bucket, shape), buckets=2 if overlap and stage != 3 else 1)
    if not zero.get("contiguous_gradients", True):
        made = replace(made, buckets=0)
    return replace(
        made,
        offload_optimizer=_offloads(zero.get("offload_optimizer")),
        offload_parameters=stage == 3 and _offloads(zero.get("offload_param")),
    )


def _values(size: Any, shape: Shape) -> int:
    return shape.hidden_size**2 if size == "auto" else int(size)


def _offloads(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("device", "none") != "none"


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds the whole stage long (`host`: in the host's memory), and those of its step alone."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    host: int = 0


def held(
    engine: Engine, *, frozen: int, trained: int, states: int, accumulates: bool, copies: float, paged: bool = False
) -> Held:
    """What a rank holds.

    Args:
        frozen: bytes of what isn't trained. trained: of what is; of its gradients as many.
        states: bytes of the optimizer's states of all that is trained.
        accumulates: gradients of several micro-batches are summed.
        copies: of the trained values, that a step of this optimizer makes.
    """
    world, full = engine.world, trained
    part = -(-full // world)
    if engine.zero in (None, 0):
        # DDP's gradients lie in the buffers that are exchanged, but for those that are still being summed. Of one
        # process the pass itself counts them until the step, unless those of earlier micro-batches are there already.
        first = full if accumulates or world > 1 else 0
        buckets = full if accumulates and world > 1 else 0
        return Held(frozen + full, first, 0 if paged else states, buckets, full + round(copies * full), states * paged)
    states = -(-states // world)
    buffers = engine.bucket * FLOAT32 * engine.buckets
    on_host = engine.offload_optimizer
    if engine.zero == 3:
        weights = -(-(frozen + full) // world)
        whole = min(frozen + full, LIVE * FLOAT32)
        buffers += whole
        host = (states + part if on_host else 0) + (weights if engine.offload_parameters else 0)
        kept = 0 if engine.offload_parameters else weights
        return Held(kept, 0 if on_host else part, 0 if on_host else states, buffers, 0, host)
    master = 0 if on_host else part
    host = 3 * part + states if on_host else 0
    if engine.zero == 1:
        first = full if accumulates else 0
        return Held(frozen + full, first, (0 if on_host else states) + master, buffers, full + 2 * part, host)
    sums = 0 if on_host else part * (2 if accumulates else 1)
    return Held(frozen + full, sums, (0 if on_host else states) + master, buffers, 0 if on_host else 2 * part, host)
