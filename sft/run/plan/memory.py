"""The memory of a rank in a stage: what it holds, what a pass adds, and where it is most."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from sft.run.plan.engines import Engine, held
from sft.run.plan.ops import Adapters, Types
from sft.run.plan.optimizers import STEP_COPIES, is_paged, state_bytes
from sft.run.plan.passes import Batch, PassMemory, Recompute, training_pass
from sft.run.plan.shape import FLOAT32, Shape
from sft.run.plan.shares import Share, shares_of

FOUR_BITS = 0.5 + 1 / 64 + 4 / (64 * 256)
"""NF4: half a byte, a scale of 8 bits for each 64 values, and one of float32 for each 256 of those."""
NOT_FOUR_BITS = ("dt_proj",)


@dataclass(frozen=True)
class Layout:
    """How a stage trains, as far as memory and time follow from it.

    Attributes:
        rows, length: of a micro-batch of a rank, and its tokens. documents: of a micro-batch. kept, supervised: the
            shares of tokens that the cross-decoder computes and that have a loss.
        accumulation: micro-batches of a step.
        frozen_width: bytes of a frozen weight. ema: an average of what is trained is kept.
        weights_width, states_width: bytes of a trained weight that takes decay, and of each of its moments.
        sharing: ranks that share a row.
    """

    engine: Engine
    rows: int
    length: int
    documents: int
    accumulation: int
    recompute: Recompute
    bf16: bool
    optimizer: str = "adamw_torch_fused"
    optimizer_arguments: str | None = None
    adapters: Adapters | None = None
    frozen_width: int = 2
    four_bit: bool = False
    ema: bool = False
    kept: float = 1.0
    supervised: float = 1.0
    device: str = "gpu"
    weights_width: int = FLOAT32
    states_width: int = FLOAT32
    sharing: int = 1

    @property
    def tokens(self) -> int:
        """Of a micro-batch of a rank, or of the ranks that share its rows."""
        return self.rows * self.length

    @property
    def rows_of_a_step(self) -> int:
        """Of all ranks."""
        return self.rows * self.accumulation * self.engine.world // self.sharing

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed again in the backward pass."""
        return self.recompute.layers

    def types(self) -> Types:
        """What is held and computed in which type."""
        width = self.weights_width if self.adapters is None else self.frozen_width
        small = FLOAT32 if self.adapters is None else self.frozen_width
        cached = self.bf16 and not self.recompute.layers
        return Types(2 if self.bf16 else FLOAT32, width, small, self.four_bit, self.device, cached)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of a rank at its fullest, by what they are; `host`: beside them, in the host's memory.

    Attributes:
        moment: `forward`, `backward` or `step`: when it is fullest.
        after_forward: activations that wait for the backward pass.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporaries: int
    buffers: int
    moment: str
    after_forward: int
    host: int = 0

    @property
    def total(self) -> int:
        """All but the host's."""
        parts = (self.weights, self.gradients, self.optimizer, self.activations, self.temporaries, self.buffers)
        return sum(parts)

    def parts(self) -> dict[str, int]:
        """By name, in the order in which they are told."""
        names = ("weights", "gradients", "optimizer", "activations", "temporaries", "buffers")
        return {name: getattr(self, name) for name in names}


def trained_values(shape: Shape, adapters: Adapters | None) -> int:
    """How many values a stage trains."""
    if adapters is None:
        return shape.parameters
    found = [matrix for matrix in shape.matrices() if matrix.name in adapters.targets]
    magnitudes = sum(matrix.out for matrix in found) if adapters.dora else 0
    return sum(adapters.rank * (matrix.out + matrix.width) for matrix in found) + magnitudes


def trained_bytes(shape: Shape, layout: Layout) -> int:
    """Of weights that are trained; of their gradients as many."""
    if layout.adapters is not None:
        return trained_values(shape, layout.adapters) * FLOAT32
    return shape.decaying * layout.weights_width + (shape.parameters - shape.decaying) * FLOAT32


def states_of(shape: Shape, layout: Layout) -> int:
    """Bytes of the optimizer's states, of all ranks together."""
    trained, adapters = trained_values(shape, layout.adapters), layout.adapters is not None
    states = state_bytes(layout.optimizer, layout.optimizer_arguments, shape, trained, adapters=adapters)
    return states - 2 * shape.decaying * (FLOAT32 - layout.states_width)


def frozen_bytes(shape: Shape, layout: Layout) -> int:
    """Of weights that aren't trained."""
    if layout.adapters is None:
        return 0
    if layout.four_bit:
        small = sum(matrix.numel for matrix in shape.matrices() if matrix.name not in NOT_FOUR_BITS)
        return round(small * FOUR_BITS) + (shape.parameters - small) * FLOAT32
    wide = shape.always_float32
    return (shape.parameters - wide) * layout.frozen_width + wide * FLOAT32


@lru_cache(maxsize=256)
def _pass(shape: Shape, layout: Layout) -> PassMemory:
    """Of the rank that takes most, where ranks share rows."""
    shares = shares_of(shape, layout.sharing, layout.tokens, layout.documents)
    return max((_pass_of_a_share(shape, layout, share) for share in shares), key=lambda found: found.total)


def _pass_of_a_share(shape: Shape, layout: Layout, share: Share) -> PassMemory:
    kept, supervised = round(share.tokens * layout.kept), round(share.tokens * layout.supervised)
    batch = Batch(share.tokens, kept, supervised, share.documents, layout.sharing > 1, share.before, share.goes_on)
    return training_pass(
        shape,
        batch,
        layout.types(),
        recompute=layout.recompute,
        adapters=layout.adapters,
        keeps_gradients=layout.engine.keeps_gradients,
    )


def pass_of(shape: Shape, layout: Layout) -> PassMemory:
    """The pass of a layout; layouts that differ in what it doesn't follow from share one.

    Gradients that are added to those of earlier micro-batches, or that an engine takes, go at once.
    """
    buffered = layout.engine.zero in (None, 0) and layout.engine.world > 1
    stay = layout.engine.keeps_gradients and layout.accumulation == 1 and not buffered
    alike = Engine(zero=None if stay else 2)
    # ZeRO-3 parts the weights, and the MLPs' chunks leave parted weights alone.
    recompute = replace(layout.recompute, chunks=layout.engine.zero != 3)
    same = {
        "recompute": recompute,
        "states_width": FLOAT32,
        "accumulation": 1,
        "optimizer": "",
        "optimizer_arguments": None,
        "ema": False,
    }
    return _pass(shape, replace(layout, engine=alike, **same))  # type: ignore[arg-type]


def rank_memory(shape: Shape, layout: Layout) -> RankMemory:
    """What a rank of `layout` takes when it takes most."""
    trained = trained_bytes(shape, layout)
    fixed = held(
        layout.engine,
        frozen=frozen_bytes(shape, layout),
        trained=trained,
        states=states_of(shape, layout),
        accumulates=layout.accumulation > 1,
        copies=STEP_COPIES.get(layout.optimizer, 0.0),
        paged=is_paged(layout.optimizer),
    )
    weights = fixed.weights + (trained_values(shape, layout.adapters) * FLOAT32 if layout.ema else 0)
    found = pass_of(shape, layout)
    peak = dict(found.peak)
    moment, gradients = found.peak_in, fixed.gradients + peak["gradients"]
    activations, temporaries = peak["activations"], peak["temporaries"]
    if fixed.step > gradients + activations + temporaries:
        moment, activations, temporaries = "step", 0, 0
        gradients = max(fixed.gradients, min(fixed.step, trained))
        temporaries = fixed.step - gradients
    return RankMemory(
        weights,
        gradients,
        fixed.optimizer,
        activations,
        temporaries,
        fixed.buffers,
        moment,
        found.after_forward,
        fixed.host + found.host,
    )
