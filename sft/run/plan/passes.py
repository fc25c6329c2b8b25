"""A training pass of a SambaY on a tape: the model's forward, written down in sizes, and its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from sft.run.plan.ops import Adapters, Ops, Types
from sft.run.plan.shape import FLOAT32, Matrix, Shape
from sft.run.plan.tape import Gradients, Held, Memory, Tape, Value, run_backward


@dataclass(frozen=True)
class Batch:
    """What a process computes at once: tokens, those that the cross-decoder computes (a suffix of each document),
    supervised ones, and documents."""

    tokens: int
    kept: int
    supervised: int
    documents: int = 1


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside weights and optimizer.

    Attributes:
        after_forward: what waits for the backward pass.
        peak: by kind (gradients, activations, temporaries) when it is most.
        peak_in: `forward` or `backward`.
    """

    after_forward: int
    peak: dict[str, int]
    peak_in: str

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.peak.values())


def training_pass(
    shape: Shape,
    batch: Batch,
    types: Types,
    *,
    checkpointing: bool,
    adapters: Adapters | None = None,
    keeps_gradients: bool = True,
    inside: bool = True,
) -> PassMemory:
    """Count a forward and a backward pass, the first of a step. `inside`: with what ops use inside, too."""
    memory = Memory(inside=inside)
    ops = Ops(memory, Tape(memory), shape, types, adapters, keeps_gradients)
    model = _Model(ops, batch, checkpointing)
    loss = model.forward()
    ops.casts.clear()
    after, in_forward = memory.total, memory.peak
    memory.kind = "temporaries"
    assert loss.node is not None
    ends, given = [loss.node], [memory.hold(FLOAT32)]
    del loss
    run_backward(ends, list[Held | None](given))
    return PassMemory(after, dict(memory.at_peak), "backward" if memory.peak > in_forward else "forward")


Taken = tuple[Value, Value | None, Value | None, Value | None]
"""What a layer is given, and what it hands on: hidden states, memory, keys, values."""


class _Model:
    """As Phi4FlashModel: names and order are those of modeling_phi4flash.py."""

    def __init__(self, ops: Ops, batch: Batch, checkpointing: bool) -> None:
        self.ops, self.batch, self.checkpointing = ops, batch, checkpointing

    def forward(self) -> Value:
        """To the loss."""
        ops, shape = self.ops, self.ops.shape
        hidden = ops.embed(self.batch.tokens)
        memory = keys = values = None
        shared = False
        for index in range(shape.num_hidden_layers):
            kind = shape.kind(index)
            read = None
            if kind == "gmu" and memory is not None:
                read = self._reader(memory) if shared else memory
            shares = kind == "cross"
            taken = (hidden, read, keys if shares else None, values if shares else None)
            layer = self._checkpointed if self.checkpointing else self._layer
            hidden, made, *new = layer(index, taken)
            del taken, read
            memory = made if made is not None else memory
            if index == shape.shared_layer:
                keys, values = new
                assert memory is not None
                memory = ops.pick(memory, self.batch.kept, ops.types.product)
                shared = ops.types.product < FLOAT32 and memory.node is not None
                if shared:
                    memory = self._source(memory)
        hidden = ops.norm(hidden, None, ops.types.weight)[1]
        return ops.loss(hidden, self.batch.supervised)

    def _source(self, memory: Value) -> Value:
        """Hands out a tensor to readers; their gradients' float32 sum is its own."""
        out, size = Value(memory.data, memory.rows, memory.columns), memory.data.size
        self.total: list[Held] = []

        def backward(given: Gradients) -> Gradients:
            made = self.ops.memory.hold(size)
            self.total.clear()
            return [made]

        self.ops.tape.op([memory], [out], backward)
        return out

    def _reader(self, memory: Value) -> Value:
        out, hold = Value(memory.data, memory.rows, memory.columns), self.ops.memory
        wide = memory.rows * memory.columns * FLOAT32

        def backward(given: Gradients) -> Gradients:
            if not self.total:
                self.total.append(hold.hold(wide))
            return [hold.hold(0)]

        self.ops.tape.op([memory], [out], backward)
        return out

    def _checkpointed(self, index: int, taken: Taken) -> Taken:
        """A layer that keeps what it was given alone and is computed again in the backward pass."""
        ops, tape = self.ops, self.ops.tape
        tape.recording = False
        made = self._layer(index, taken)
        tape.recording = True
        given_values = [value for value in taken if value is not None]
        outputs = [value for value in made if value is not None]
        held = [value.data for value in given_values]
        sizes = [value and (value.rows, value.columns, value.node is not None) for value in taken]

        def backward(given: Gradients) -> Gradients:
            data, leaves = iter(held), []
            again: list[Value | None] = []
            for size in sizes:
                value = Value(next(data), *size[:2]) if size else None
                if value is not None and size and size[2]:
                    value, leaf = tape.leaf(value)
                    leaves.append(leaf)
                again.append(value)
                del value
            remade = self._layer(index, tuple(again))  # type: ignore[arg-type]
            ops.casts.clear()
            ends = [value.node for value in remade if value is not None and value.node is not None]
            passed: Gradients = [*given, *[None] * (len(ends) - len(given))]
            given.clear()
            held.clear()
            del remade, again, data
            arrived = iter(run_backward(ends, passed, leaves))
            return [next(arrived) if size[2] else None for size in sizes if size]

        tape.op(given_values, outputs, backward, trains=True)
        return made

    def _layer(self, index: int, taken: Taken) -> Taken:
        ops, shape, (hidden, memory, keys, values) = self.ops, self.ops.shape, taken
        kind, linear = shape.kind(index), shape.matrices_of(index)
        product, kept = ops.types.product, self.batch.kept
        mixed = ops.norm(hidden, None, product)[1]
        if kind == "gmu":
            assert memory is not None
            mixed = ops.linear(ops.swiglu(ops.linear(mixed, linear["in_proj"]), memory), linear["out_proj"])
        elif kind == "mamba":
            mixed, memory = self._mamba(index, mixed)
        else:
            mixed, keys, values = self._attention(index, mixed, keys, values)
        if index != shape.memory_layer:
            memory = None
        if index == shape.shared_layer:
            hidden = ops.pick(hidden, kept, FLOAT32)
        else:
            keys = values = None
        if index == 0:
            hidden = ops.cast(hidden, ops.types.weight, FLOAT32)
        hidden, normed = ops.norm(hidden, mixed, product)
        fused = ops.linear(normed, linear["fc1"])
        return ops.add(hidden, self._mlp(fused, linear["fc2"])), memory, keys, values

    def _mlp(self, fused: Value, last: Matrix) -> Value:
        gated = self.ops.swiglu_fused(fused)
        return self.ops.linear(gated, last)

    def _mamba(self, index: int, hidden: Value) -> tuple[Value, Value]:
        ops, shape, documents = self.ops, self.ops.shape, self.batch.documents
        linear, states = shape.matrices_of(index), shape.mamba_d_state
        inner, gate = ops.split(ops.linear(hidden, linear["in_proj"]), shape.inner, shape.inner)
        inner, _conv_state = ops.convolution(inner, documents)
        small = ops.split(ops.linear(inner, linear["x_proj"]), shape.mamba_dt_rank, states, states)
        steps = ops.linear(small[0], linear["dt_proj"])
        memory, _scan_state = ops.scan(inner, steps, small[1], small[2], documents)
        del inner, small, steps
        return ops.linear(ops.swiglu(gate, memory), linear["out_proj"]), memory

    def _attention(
        self, index: int, hidden: Value, keys: Value | None, values: Value | None
    ) -> tuple[Value, Value, Value]:
        ops, shape = self.ops, self.ops.shape
        linear = shape.matrices_of(index)
        queries = ops.linear(hidden, linear["Wqkv"])
        if shape.kind(index) != "cross":
            queries, keys, values = ops.split(queries, shape.hidden_size, shape.kv_width, shape.kv_width)
        if index == shape.shared_layer:
            queries = ops.pick(queries, self.batch.kept, ops.types.product)
        assert keys is not None and values is not None
        return ops.linear(ops.attention(queries, keys, values), linear["out_proj"]), keys, values
