"""The ops of a SambaY on a tape: what each makes, saves for its backward pass, makes there, and uses inside.

Each stands beside the op that it counts (sambay_kernels.ops, torch, peft); tests count the real ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sft.run.plan.shape import FLOAT32, Matrix, Shape
from sft.run.plan.tape import Gradients, Held, Memory, Tape, Value

SCAN_TILE, SCAN_SEGMENT = 32, 512
"""Channels of a program of the scan, and about how many tokens a segment has."""
LOSS_CHUNK, SCORED, MET, VOCABULARY_BLOCK = 256, 4, 16, 8192
"""Of linear_cross_entropy: tokens of a chunk, chunks whose logits are made at once, and whose gradients meet the
weight at once; columns of a block."""
PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj", "Wqkv", "fc1", "fc2")
"""What adapters adapt by default (sft.models.load.LORA_TARGETS)."""
KEPT_EVERY = {"gpu": 8, "cpu": 32}
"""Tokens between two states that the scan keeps: Triton's and the C++ backend's (with nvcc a GPU keeps half)."""


@dataclass(frozen=True)
class Types:
    """Bytes of a value.

    Attributes:
        product: what linear layers compute in. stream: the residual stream. weight: trained weights are held in, or,
            with adapters, frozen ones. small: norms' weights are held in.
        four_bit: whether frozen linear layers are held in 4 bits.
        device: `gpu` or `cpu`: whose kernels run.
        cached_casts: autocast keeps what it made of a trained weight until the forward pass is over.
    """

    product: int = 2
    weight: int = 4
    small: int = 4
    four_bit: bool = False
    device: str = "gpu"
    cached_casts: bool = True

    @property
    def stream(self) -> int:
        """float32 whatever the rest is in."""
        return FLOAT32


@dataclass(frozen=True)
class Adapters:
    """LoRA: rank, which modules, and the share of values that dropout leaves out."""

    rank: int
    targets: frozenset[str]
    dropout: float = 0.0
    dora: bool = False


@dataclass
class Ops:
    """Ops of one pass. `keeps_gradients`: a parameter's stays until the step; else an engine takes it at once."""

    memory: Memory
    tape: Tape
    shape: Shape
    types: Types
    adapters: Adapters | None = None
    keeps_gradients: bool = True
    casts: dict[tuple[int, str], Held] = field(default_factory=dict)
    gradients: dict[tuple[int, str], Held] = field(default_factory=dict)

    @property
    def trains_all(self) -> bool:
        """Whether every weight is trained."""
        return self.adapters is None

    def new(self, rows: int, columns: int, width: int) -> Value:
        """A tensor that nothing is recorded of."""
        return Value(self.memory.hold(rows * columns * width), rows, columns)

    def take(self, key: tuple[int, str], made: Held, size: int, *, waits: bool = False) -> None:
        """A weight's gradient, widened to `size` bytes where it isn't so wide: it stays, or an engine takes it at once.
        `waits`: for another gradient of the same weight, whoever takes them."""
        stays = self.keeps_gradients or waits
        if made.size != size:
            made = self.memory.hold(size, "gradients" if stays else None)
        elif stays:
            made.become("gradients")
        if stays:
            self.gradients[key] = made

    # ---- linear layers ----

    def linear(self, x: Value, matrix: Matrix) -> Value:
        """`(n, in)` -> `(n, out)`, with an adapter where there is one."""
        adapters = self.adapters
        adapted = adapters is not None and matrix.name in adapters.targets
        out = self._product(x, matrix, (matrix.layer, matrix.name), self.types.weight, frozen=not self.trains_all)
        if not adapted or adapters is None:
            return out
        x = self.cast(x, self.types.product, FLOAT32)
        return self._same(out, self._scaled(self._adapted(x, matrix, adapters)))

    def _adapted(self, x: Value, matrix: Matrix, adapters: Adapters) -> Value:
        """An adapter's two products, before they are scaled; its weights are float32, and so is x."""
        down = Matrix(matrix.layer, f"{matrix.name}.A", adapters.rank, matrix.width)
        up = Matrix(matrix.layer, f"{matrix.name}.B", matrix.out, adapters.rank)
        low = self._dropout(x) if adapters.dropout else x
        low = self.cast(low, FLOAT32, self.types.product)
        low = self._product(low, down, (down.layer, down.name), FLOAT32, frozen=False)
        return self._product(low, up, (up.layer, up.name), FLOAT32, frozen=False)

    def _product(self, x: Value, matrix: Matrix, key: tuple[int, str], width: int, *, frozen: bool) -> Value:
        weight = self._weight(matrix.numel, key, width, frozen=frozen)
        out = self.new(x.rows, matrix.out, self.types.product)
        saved = ([weight] if weight is not None and x.node else []) + ([] if frozen else [x.data])
        memory, product, rows, columns, needs = self.memory, self.types.product, x.rows, x.columns, x.node is not None
        unpacked = matrix.numel * product if self.types.four_bit and frozen else 0

        def backward(given: Gradients) -> Gradients:
            of_x = memory.hold(rows * columns * product) if needs else None
            memory.note(unpacked)
            if not frozen:
                of_weight = memory.hold(matrix.numel * product)
                given.clear()
                self.take(key, of_weight, matrix.numel * width)
            return [of_x]

        memory.note(unpacked)
        self.tape.op([x], [out], backward, saved, trains=not frozen)
        return out

    def _weight(self, numel: int, key: tuple[int, str], width: int, *, frozen: bool) -> Held | None:
        """A weight as a product takes it, where that is a copy: autocast's, kept or not."""
        if width == self.types.product or (frozen and self.types.four_bit):
            return None
        if key in self.casts:
            return self.casts[key]
        made = self.memory.hold(numel * self.types.product)
        if self.types.cached_casts and not frozen:
            self.casts[key] = made
        return made

    def cast(self, x: Value, before: int, after: int) -> Value:
        """The same values in another type: a copy, unless it is their own."""
        if before == after:
            return x
        out, memory = self.new(x.rows, x.columns, after), self.memory
        size = x.rows * x.columns * before
        self.tape.op([x], [out], lambda given: [memory.hold(size)])
        return out

    def _dropout(self, x: Value) -> Value:
        out, memory, size = self.new(x.rows, x.columns, FLOAT32), self.memory, x.rows * x.columns
        mask = memory.hold(size if self.types.device == "gpu" else size * FLOAT32)
        self.tape.op([x], [out], lambda given: [memory.hold(size * FLOAT32)], [mask])
        return out

    def _scaled(self, x: Value) -> Value:
        out, memory, size = self.new(x.rows, x.columns, self.types.product), self.memory, x.data.size
        self.tape.op([x], [out], lambda given: [memory.hold(size)])
        return out

    def _same(self, x: Value, y: Value) -> Value:
        """x + y of one type, whose gradient is both's."""
        out = self.new(x.rows, x.columns, self.types.product)
        self.tape.op([x, y], [out], lambda given: [given[0], given[0]])
        return out

    # ---- between them ----

    def norm(self, hidden: Value, delta: Value | None, width: int) -> tuple[Value, Value]:
        """LayerNorm of hidden (+ delta) in a type of `width` bytes; and the sum."""
        rows, columns, types, memory = hidden.rows, hidden.columns, self.types, self.memory
        total = hidden if delta is None else self.new(rows, columns, types.stream)
        normed, stats = self.new(rows, columns, width), memory.hold(rows * 8)
        rounded = types.small < hidden.data.size // (rows * columns)
        read = memory.hold(rows * columns * types.small) if rounded else total.data
        size, given_as = rows * columns * types.stream, types.product

        def backward(given: Gradients) -> Gradients:
            if given[0] is None:  # of the sum alone
                return [given[-1], None] if delta_there else [None]
            of_total = memory.hold(size)
            of_delta = memory.hold(rows * columns * given_as) if delta_there and given_as != types.stream else of_total
            return [of_total, of_delta] if delta_there else [of_total]

        delta_there = delta is not None
        trains = self.trains_all
        if delta is None:
            self.tape.op([hidden], [normed], backward, [read, stats], trains=trains)
        else:
            self.tape.op([hidden, delta], [normed, total], backward, [read, stats], trains=trains)
        return total, normed

    def add(self, stream: Value, x: Value) -> Value:
        """The residual stream and a layer's output, which is in the products' type."""
        out, memory, types = self.new(stream.rows, stream.columns, self.types.stream), self.memory, self.types
        size = x.data.size

        def backward(given: Gradients) -> Gradients:
            return [given[0], given[0] if types.product == types.stream else memory.hold(size)]

        self.tape.op([stream, x], [out], backward)
        return out

    def swiglu(self, gate: Value, value: Value) -> Value:
        """silu(gate) * value."""
        out, memory = self.new(gate.rows, gate.columns, self.types.product), self.memory
        size = out.data.size
        self.tape.op(
            [gate, value], [out], lambda given: [memory.hold(size), memory.hold(size)], [gate.data, value.data]
        )
        return out

    def swiglu_fused(self, fused: Value) -> Value:
        """The same of a tensor's two halves."""
        out, memory, size = self.new(fused.rows, fused.columns // 2, self.types.product), self.memory, fused.data.size
        self.tape.op([fused], [out], lambda given: [memory.hold(size)], [fused.data])
        return out

    def split(self, x: Value, *columns: int) -> list[Value]:
        """Views of columns; their gradients are put together in a new tensor."""
        views, memory, size = [Value(x.data, x.rows, width) for width in columns], self.memory, x.data.size
        self.tape.op([x], views, lambda given: [memory.hold(size)])
        return views

    def pick(self, x: Value, rows: int, width: int) -> Value:
        """A copy of some of the rows, of values of `width` bytes."""
        out, memory, size = self.new(rows, x.columns, width), self.memory, x.rows * x.columns * width
        self.tape.op([x], [out], lambda given: [memory.hold(size)])
        return out

    def append(self, x: Value, before: int) -> Value:
        """x, after so many rows of other processes."""
        width, memory = self.types.product, self.memory
        out, size = self.new(before + x.rows, x.columns, width), x.data.size
        self.tape.op([x], [out], lambda given: [memory.hold(size)])
        return out

    # ---- mixers ----

    def convolution(self, x: Value, documents: int) -> tuple[Value, Held]:
        """Convolution and SiLU; and the documents' last states."""
        out, memory = self.new(x.rows, x.columns, self.types.product), self.memory
        size = out.data.size
        final = memory.hold(documents * x.columns * (self.shape.mamba_d_conv - 1) * self.types.product)
        self.tape.op([x], [out], lambda given: [memory.hold(size)], [x.data], trains=self.trains_all)
        return out, final

    def scan(
        self, u: Value, delta: Value, b: Value, c: Value, documents: int, first: Value | None = None
    ) -> tuple[Value, Value]:
        """The selective scan from the documents' `first` states; and their last ones, float32."""
        shape, memory, rows, inner = self.shape, self.memory, u.rows, u.columns
        out = self.new(rows, inner, self.types.product)
        state = inner * shape.mamba_d_state * FLOAT32
        final = self.new(documents, inner * shape.mamba_d_state, FLOAT32)
        kept = memory.hold((rows // KEPT_EVERY[self.types.device] + documents) * state) if self.tape.recording else None
        segments = (rows // SCAN_SEGMENT + documents) * state
        tiles = -(-inner // SCAN_TILE)
        on_gpu = self.types.device == "gpu"
        inside = 4 * segments + 2 * tiles * rows * shape.mamba_d_state * FLOAT32 if on_gpu else 0
        size, small = out.data.size, rows * shape.mamba_d_state * self.types.product

        def backward(given: Gradients) -> Gradients:
            found: Gradients = [memory.hold(size), memory.hold(size), memory.hold(small), memory.hold(small)]
            memory.note(inside)
            return [*found, memory.hold(documents * state)] if begins else found

        begins = first is not None
        memory.note(3 * segments if on_gpu else 0)
        inputs = [u, delta, b, c, *([first] if first else [])]
        saved = [*(x.data for x in inputs), *([kept] if kept else [])]
        self.tape.op(inputs, [out, final], backward, saved, trains=self.trains_all)
        return out, final

    def state_before(self, reached: Value, steps: Value | None, documents: int) -> Value:
        """The state that a share begins with, from what all ranks have come to; `steps` are summed where all of a
        document's part is passed through."""
        out, memory = self.new(documents, reached.columns, FLOAT32), self.memory
        size, wide = reached.data.size, 0 if steps is None else steps.rows * steps.columns
        narrow = wide * self.types.product

        def backward(given: Gradients) -> Gradients:
            memory.note(wide * FLOAT32)
            return [memory.hold(size), *([memory.hold(narrow)] if wide else [])]

        saved = [memory.hold(wide * FLOAT32)] if wide else []
        self.tape.op([reached, *([steps] if steps else [])], [out], backward, saved)
        return out

    def attention(self, q: Value, k: Value, v: Value, kept: list[Held] | None = None) -> Value:
        """Differential attention: both maps of every pair of heads, then what is made of them.

        `kept`: where selective checkpointing leaves what the op makes, and finds it when it is asked for again.
        """
        memory, width, heads = self.memory, self.types.product, self.shape.num_attention_heads
        sizes = [q.rows * q.columns * width, k.rows * k.columns * width, v.rows * v.columns * width]
        if self.types.device == "cpu":
            results = self._made([sizes[0], sizes[0], q.rows * heads * 2 * FLOAT32], kept)
            out = Value(results[0], q.rows, q.columns)
            saved = [q.data, k.data, v.data, *results[1:]]
            self.tape.op([q, k, v], [out], lambda given: [memory.hold(size) for size in sizes], saved)
            return out
        results = self._made([2 * sizes[0], q.rows * heads * FLOAT32], kept)
        maps = Value(results[0], q.rows, 2 * q.columns)
        saved = [q.data, k.data, v.data, *results]
        inside = q.rows * heads * FLOAT32

        def of_maps(given: Gradients) -> Gradients:
            found: Gradients = [memory.hold(size) for size in sizes]
            memory.note(inside)
            return found

        self.tape.op([q, k, v], [maps], of_maps, saved)
        out, size = self.new(q.rows, q.columns, width), maps.data.size
        self.tape.op([maps], [out], lambda given: [memory.hold(size)], [maps.data], trains=self.trains_all)
        return out

    def _made(self, sizes: list[int], kept: list[Held] | None) -> list[Held]:
        if kept is None:
            return [self.memory.hold(size) for size in sizes]
        if not kept:
            kept.extend(self.memory.hold(size) for size in sizes)
            return list(kept)
        made = list(kept)
        kept.clear()
        return made

    # ---- both ends ----

    def embed(self, tokens: int) -> Value:
        """The embeddings, in the weight's type."""
        out, shape, memory = self.new(tokens, self.shape.hidden_size, self.types.weight), self.shape, self.memory
        size = shape.embedding * self.types.weight

        def backward(given: Gradients) -> Gradients:
            self.take((-1, "embed_tokens"), memory.hold(size), size)
            return []

        self.tape.op([], [out], backward, trains=self.trains_all)
        return out

    def loss(self, hidden: Value, supervised: int) -> Value:
        """The loss of final hidden states, which makes its gradients on the way."""
        shape, types, memory = self.shape, self.types, self.memory
        hidden = self.cast(hidden, types.small, types.product) if types.device == "gpu" else hidden
        wide = types.product if types.device == "gpu" else types.weight
        if self.trains_all and types.device == "gpu":
            self._weight(shape.embedding, (-1, "embed_tokens"), types.weight, frozen=False)
        by_tokens = types.device == "gpu" or (types.weight == FLOAT32 and shape.embedding * FLOAT32 <= 512 << 20)
        rows, columns = hidden.rows, hidden.columns
        memory.note(self._inside_loss(supervised))
        saved = [memory.hold(rows * columns * FLOAT32)] if by_tokens else [hidden.data, memory.hold(4 * rows * FLOAT32)]
        if by_tokens and self.trains_all:
            saved.append(memory.hold(shape.embedding * wide))
        key, trains = (-1, "lm_head"), self.trains_all

        def backward(given: Gradients) -> Gradients:
            of_hidden = memory.hold(rows * columns * wide)
            if trains:
                of_weight = memory.hold(shape.embedding * wide)
                self.take(key, of_weight, shape.embedding * types.weight, waits=True)
            return [of_hidden]

        out = self.new(1, 1, FLOAT32)
        self.tape.op([hidden], [out], backward, saved, trains=trains)
        return out

    def _inside_loss(self, supervised: int) -> int:
        """What the loss holds at its fullest beside what it hands on."""
        shape, product = self.shape, self.types.product
        rows = supervised * shape.hidden_size * (FLOAT32 + product)
        weight = shape.embedding * FLOAT32 * self.trains_all
        met = min(supervised, LOSS_CHUNK * (MET if product == 2 else SCORED))
        scored = min(supervised, LOSS_CHUNK * SCORED)
        return rows + weight + shape.vocab_size * (met * product + scored * FLOAT32)
