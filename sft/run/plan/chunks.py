"""An MLP in chunks of its tokens, in sizes: as sft.models.sambay.chunked_phi4flash does it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from sft.run.plan.ops import Ops
from sft.run.plan.shape import FLOAT32, Matrix
from sft.run.plan.tape import Gradients, Held, Value, run_backward

CHUNK = 8192
"""Tokens at a time."""


@dataclass
class _ChunkOps(Ops):
    """Ops of a chunk, whose weights' gradients are added to those of other chunks, and handed on at the end."""

    found: dict[tuple[int, str], Held] = field(default_factory=dict)
    totals: dict[tuple[int, str], tuple[Held, int]] = field(default_factory=dict)

    def take(self, key: tuple[int, str], made: Held, size: int, *, waits: bool = False) -> None:
        self.found[key] = made if made.size == size else self.memory.hold(size)

    def add_up(self) -> None:
        """All that a chunk has found, at once, as torch.autograd.grad gives it."""
        wider = FLOAT32 // self.types.weight if self.trains_all else 1
        for key, one in self.found.items():
            if key not in self.totals:
                self.totals[key] = (one if wider == 1 else self.memory.hold(one.size * wider), one.size)
        self.found.clear()


def mlp_in_chunks(ops: Ops, tokens: Value, first: Matrix, last: Matrix) -> Value:
    """`(n, in)` -> `(n, out)` of fc1, the gate and fc2; its backward pass computes each chunk again."""
    memory, tape, rows, columns = ops.memory, ops.tape, tokens.rows, tokens.columns
    uncached = replace(ops.types, cached_casts=False)
    inside = _ChunkOps(memory, tape, ops.shape, uncached, ops.adapters, ops.keeps_gradients)
    sizes = [min(CHUNK, rows - start) for start in range(0, rows, CHUNK)]

    def mlp(read: Value) -> Value:
        return inside.linear(inside.swiglu_fused(inside.linear(read, first)), last)

    def backward(given: Gradients) -> Gradients:
        of_tokens = memory.hold(rows * columns * ops.types.product)
        for size in sizes:
            read, leaf = tape.leaf(Value(memory.hold(0), size, columns))
            made = mlp(read)
            assert made.node is not None
            ends, gradients = [made.node], [memory.hold(0)]
            del made, read
            run_backward(ends, list[Held | None](gradients), [leaf])
            inside.add_up()
        rounded = [(key, _in_own_type(ops, total, size), size) for key, (total, size) in inside.totals.items()]
        inside.totals.clear()
        given.clear()
        while rounded:
            ops.take(*rounded.pop(0))
        return [of_tokens]

    recording, tape.recording = tape.recording, False
    whole = ops.new(rows, last.out, ops.types.product)
    mlp(Value(memory.hold(0), sizes[0], columns))
    tape.recording = recording
    tape.op([tokens], [whole], backward, [tokens.data], trains=ops.trains_all or ops.adapters is not None)
    return whole


def _in_own_type(ops: Ops, total: Held, size: int) -> Held:
    return total if total.size == size else ops.memory.hold(size)
