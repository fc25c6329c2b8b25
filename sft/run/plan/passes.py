"""A training pass of a SambaY on a tape: the model's forward, written down in sizes, and its backward pass."""

from __future__ import annotations

from dataclasses import dataclass

from sft.run.plan.chunks import CHUNK, mlp_in_chunks
from sft.run.plan.ops import Adapters, Ops, Types
from sft.run.plan.shape import FLOAT32, Matrix, Shape
from sft.run.plan.tape import Gradients, Held, Memory, Tape, Value, run_backward


@dataclass(frozen=True)
class Batch:
    """What a process computes at once.

    Attributes:
        tokens, documents: that it has. kept: tokens that the cross-decoder computes, a suffix of each document.
        supervised: tokens that have a loss.
        shared: whether the tokens are a share of a row. before: tokens of its first document that others have.
        goes_on: whether others have tokens of its last document, of which this share is then taken to be a part.
    """

    tokens: int
    kept: int
    supervised: int
    documents: int = 1
    shared: bool = False
    before: int = 0
    goes_on: bool = False


@dataclass(frozen=True)
class Recompute:
    """What the backward pass computes again (gradient_checkpointing and its keys).

    Attributes:
        layers: each keeps its inputs alone. selective: and what attention over whole documents made.
        offload: the layers' first inputs wait in the host's memory.
        chunks: MLPs of long rows go in chunks, where layers are computed again.
    """

    layers: bool = True
    selective: bool = False
    offload: bool = False
    chunks: bool = True


@dataclass(frozen=True)
class PassMemory:
    """Bytes beside weights and optimizer.

    Attributes:
        after_forward: what waits for the backward pass; host: beside it, in the host's memory.
        peak: by kind (gradients, activations, temporaries) when it is most.
        peak_in: `forward` or `backward`.
    """

    after_forward: int
    peak: dict[str, int]
    peak_in: str
    host: int = 0

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.peak.values())


def training_pass(
    shape: Shape,
    batch: Batch,
    types: Types,
    *,
    recompute: Recompute,
    adapters: Adapters | None = None,
    keeps_gradients: bool = True,
    inside: bool = True,
) -> PassMemory:
    """Count a forward and a backward pass, the first of a step. `inside`: with what ops use inside, too."""
    memory = Memory(inside=inside)
    ops = Ops(memory, Tape(memory), shape, types, adapters, keeps_gradients)
    model = _Model(ops, batch, recompute)
    loss = model.forward()
    ops.casts.clear()
    after, in_forward = memory.total, memory.peak
    memory.kind = "temporaries"
    assert loss.node is not None
    ends, given = [loss.node], [memory.hold(FLOAT32)]
    del loss
    run_backward(ends, list[Held | None](given))
    return PassMemory(after, dict(memory.at_peak), "backward" if memory.peak > in_forward else "forward", model.host)


Taken = tuple[Value, Value | None, Value | None, Value | None]
"""What a layer is given, and what it hands on: hidden states, memory, keys, values."""


class _Model:
    """As Phi4FlashModel: names and order are those of modeling_phi4flash.py."""

    def __init__(self, ops: Ops, batch: Batch, recompute: Recompute) -> None:
        self.ops, self.batch, self.recompute = ops, batch, recompute
        self.host = self.sent = 0
        self.coming: list[Held] = []

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
            layer = self._checkpointed if self.recompute.layers else self._layer
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
        hidden = ops.norm(hidden, None, ops.types.small)[1]
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
        kept: list[Held] | None = [] if self.recompute.selective else None
        tape.recording = False
        made = self._layer(index, taken, kept)
        tape.recording = True
        given_values = [value for value in taken if value is not None]
        outputs = [value for value in made if value is not None]
        held = [value.data for value in given_values]
        first, offload, before = held[0].size, self.recompute.offload, self.sent
        if offload:
            del held[0]
            self.sent, self.host = first, self.host + first
        sizes = [value and (value.rows, value.columns, value.node is not None) for value in taken]

        def backward(given: Gradients) -> Gradients:
            if offload:
                held.insert(0, self.coming.pop() if self.coming else ops.memory.hold(first))
                self.coming = [ops.memory.hold(before)] if before else []
            data, leaves = iter(held), []
            again: list[Value | None] = []
            for size in sizes:
                value = Value(next(data), *size[:2]) if size else None
                if value is not None and size and size[2]:
                    value, leaf = tape.leaf(value)
                    leaves.append(leaf)
                again.append(value)
                del value
            remade = self._layer(index, tuple(again), kept)  # type: ignore[arg-type]
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

    def _layer(self, index: int, taken: Taken, kept_maps: list[Held] | None = None) -> Taken:
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
            mixed, keys, values = self._attention(index, mixed, keys, values, kept_maps)
        if index != shape.memory_layer:
            memory = None
        if index == shape.shared_layer:
            hidden = ops.pick(hidden, kept, FLOAT32)
        else:
            keys = values = None
        if index == 0:
            hidden = ops.cast(hidden, ops.types.weight, FLOAT32)
        hidden, normed = ops.norm(hidden, mixed, product)
        return ops.add(hidden, self._mlp(normed, linear["fc1"], linear["fc2"])), memory, keys, values

    def _mlp(self, normed: Value, first: Matrix, last: Matrix) -> Value:
        ops, again = self.ops, self.recompute
        drops = ops.adapters is not None and ops.adapters.dropout > 0 and bool({"fc1", "fc2"} & ops.adapters.targets)
        if again.layers and again.chunks and normed.rows > CHUNK and not drops:
            return mlp_in_chunks(ops, normed, first, last)
        return ops.linear(ops.swiglu_fused(ops.linear(normed, first)), last)

    def _mamba(self, index: int, hidden: Value) -> tuple[Value, Value]:
        ops, shape, documents = self.ops, self.ops.shape, self.batch.documents
        linear, states = shape.matrices_of(index), shape.mamba_d_state
        inner, gate = ops.split(ops.linear(hidden, linear["in_proj"]), shape.inner, shape.inner)
        inner, _conv_state = ops.convolution(inner, documents)
        small = ops.split(ops.linear(inner, linear["x_proj"]), shape.mamba_dt_rank, states, states)
        steps = ops.linear(small[0], linear["dt_proj"])
        state = self._state_before(inner, steps, small) if self.batch.shared else None
        memory, _scan_state = ops.scan(inner, steps, small[1], small[2], documents, state)
        del inner, small, steps, state
        return ops.linear(ops.swiglu(gate, memory), linear["out_proj"]), memory

    def _state_before(self, inner: Value, steps: Value, small: list[Value]) -> Value:
        """The states that a share's documents begin with: what the share comes to is scanned, and sent to others."""
        ops, batch, rows = self.ops, self.batch, inner.rows if self.batch.goes_on else 0
        u, delta, b, c = (Value(x.data, rows, x.columns, x.node) for x in (inner, steps, *small[1:]))
        _, reached = ops.scan(u, delta, b, c, 1)
        return ops.state_before(reached, steps if batch.before and batch.goes_on else None, batch.documents)

    def _attention(
        self, index: int, hidden: Value, keys: Value | None, values: Value | None, kept_maps: list[Held] | None
    ) -> tuple[Value, Value, Value]:
        ops, shape = self.ops, self.ops.shape
        linear = shape.matrices_of(index)
        queries = ops.linear(hidden, linear["Wqkv"])
        if shape.kind(index) != "cross":
            queries, keys, values = ops.split(queries, shape.hidden_size, shape.kv_width, shape.kv_width)
        assert keys is not None and values is not None
        if self.batch.shared and shape.kind(index) != "cross":
            keys, values = self._with_those_before(index, keys, values)
        if index == shape.shared_layer:
            queries = ops.pick(queries, self.batch.kept, ops.types.product)
        whole = index >= shape.shared_layer
        mixed = ops.attention(queries, keys, values, kept_maps if whole else None)
        return ops.linear(mixed, linear["out_proj"]), keys, values

    def _with_those_before(self, index: int, keys: Value, values: Value) -> tuple[Value, Value]:
        """With what others have of the share's first document, or of its window."""
        ops, before = self.ops, self.batch.before
        if index < ops.shape.shared_layer:
            before = min(before, ops.shape.sliding_window - 1)
        return ops.append(keys, before), ops.append(values, before)
