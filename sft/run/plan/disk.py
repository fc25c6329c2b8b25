"""What a stage leaves on disk: checkpoints, as many as are kept and the one that is being written, and its result."""

from __future__ import annotations

from dataclasses import dataclass

from sft.run.plan.memory import Layout, states_of, trained_bytes, trained_values
from sft.run.plan.shape import FLOAT32, Shape


@dataclass(frozen=True)
class DiskPlan:
    """Bytes of one checkpoint, how many lie there at once (None: each of `saves`, which is not known), and the
    result's."""

    checkpoint: int
    count: int | None
    result: int

    @property
    def total(self) -> int | None:
        """At the fullest."""
        return None if self.count is None else self.checkpoint * self.count + self.result


def disk_plan(shape: Shape, layout: Layout, *, limit: int | None, saves: int | None, stored_width: int) -> DiskPlan:
    """Of a stage with `saves` checkpoints in all (None: not known), of which `limit` are kept (None: all)."""
    trained, adapters = trained_values(shape, layout.adapters), layout.adapters is not None
    copies = (layout.engine.zero not in (None, 0)) + layout.ema  # DeepSpeed writes its masters too
    checkpoint = trained_bytes(shape, layout) + trained * FLOAT32 * copies + states_of(shape, layout)
    counts = [count for count in (saves, None if limit is None else limit + 1) if count is not None]
    count = min(counts) if counts else None
    result = trained * FLOAT32 if adapters else (shape.parameters - shape.always_float32) * stored_width
    return DiskPlan(checkpoint, count, result)
