"""Small decoders of random weights for tests of the decoding step: every kind of layer, any widths."""

from __future__ import annotations

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from sambay_kernels import AttentionWeights, DecoderWeights, LayerWeights, MambaWeights, MemoryUnitWeights, Slots
from torch import Tensor


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder."""

    hidden: int = 20
    key_heads: int = 2
    group: int = 2
    head_dim: int = 5
    inner: int = 44
    states: int = 8
    width: int = 4
    rank: int = 3
    intermediate: int = 33
    vocab: int = 37
    windows: tuple[int, ...] = (7,)


class _Random:
    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape, self.generator = shape, torch.Generator().manual_seed(seed)

    def matrix(self, outputs: int, inputs: int) -> Tensor:
        return torch.randn(outputs, inputs, generator=self.generator, dtype=torch.float64) * inputs**-0.5

    def vector(self, *sizes: int, around: float = 0.0) -> Tensor:
        return around + 0.3 * torch.randn(*sizes, generator=self.generator, dtype=torch.float64)

    def layer(self, mixer: Any) -> LayerWeights:
        s = self.shape
        norms = [self.vector(s.hidden, around=1.0 - i % 2) for i in range(4)]
        fc1, fc2 = self.matrix(2 * s.intermediate, s.hidden), self.matrix(s.hidden, s.intermediate)
        return LayerWeights(norms[0], norms[1], mixer, norms[2], norms[3], fc1, fc2)

    def mamba(self) -> MambaWeights:
        s = self.shape
        return MambaWeights(
            in_proj=self.matrix(2 * s.inner, s.hidden),
            conv_weight=self.vector(s.inner, s.width),
            conv_bias=self.vector(s.inner),
            x_proj=self.matrix(s.rank + 2 * s.states, s.inner),
            dt_proj=self.matrix(s.inner, s.rank),
            dt_bias=self.vector(s.inner, around=-1.0),
            A=-torch.exp(self.vector(s.inner, s.states)),
            D=self.vector(s.inner, around=1.0),
            out_proj=self.matrix(s.hidden, s.inner),
        )

    def memory_unit(self) -> MemoryUnitWeights:
        s = self.shape
        return MemoryUnitWeights(self.matrix(s.inner, s.hidden), self.matrix(s.hidden, s.inner))

    def attention(self, window: int | None, own_keys: bool = True) -> AttentionWeights:
        s = self.shape
        queries = s.key_heads * s.group * s.head_dim
        rows = queries + 2 * s.key_heads * s.head_dim * own_keys
        return AttentionWeights(
            qkv=self.matrix(rows, s.hidden) * 2,
            qkv_bias=self.vector(rows),
            out_proj=self.matrix(s.hidden, queries),
            out_bias=self.vector(s.hidden),
            lambda_full=torch.tensor(0.37, dtype=torch.float64),
            subln=self.vector(2 * s.head_dim, around=1.0),
            lambda_init=0.25,
            window=window,
            own_keys=own_keys,
        )


def random_decoder(shape: Shape, seed: int = 0, *, tied: bool = True) -> DecoderWeights:
    """Mamba and window layers, Mamba and full attention, then memory units and attention to the same keys; float64."""
    random = _Random(shape, seed)
    mixers: list[Any] = []
    for window in shape.windows:
        mixers += [random.mamba(), random.attention(window)]
    mixers += [random.mamba(), random.attention(None)]
    for _ in range(2):
        mixers += [random.memory_unit(), random.attention(None, own_keys=False)]
    embed = random.matrix(shape.vocab, shape.hidden) * 3
    return DecoderWeights(
        embed=embed,
        layers=tuple(map(random.layer, mixers)),
        norm_weight=random.vector(shape.hidden, around=1.0),
        norm_bias=random.vector(shape.hidden),
        head=embed if tied else random.matrix(shape.vocab, shape.hidden),
        eps=1e-5,
        heads=shape.key_heads * shape.group,
        key_heads=shape.key_heads,
        head_dim=shape.head_dim,
    )


def in_type(weights: Any, dtype: torch.dtype) -> Any:
    """The same weights in another type; A at least in float32."""
    if isinstance(weights, Tensor):
        return weights.to(dtype)
    if isinstance(weights, tuple):
        return tuple(in_type(each, dtype) for each in weights)
    if not is_dataclass(weights):
        return weights
    values: dict[str, Any] = {f.name: in_type(getattr(weights, f.name), dtype) for f in fields(weights)}
    if isinstance(weights, DecoderWeights) and weights.head is weights.embed:
        values["head"] = values["embed"]
    if isinstance(weights, MambaWeights):
        values["A"] = weights.A.to(torch.promote_types(dtype, torch.float32))
    return replace(weights, **values)  # type: ignore[type-var]


def empty_slots(weights: DecoderWeights, *, slots: int, page_size: int, longest: int) -> Slots:
    """Slots whose tables list pages of their own, out of order."""
    listed = -(-longest // page_size)
    made = Slots(
        weights, slots=slots, pages=slots * listed, page_size=page_size, longest=longest, dtype=weights.embed.dtype
    )
    order = torch.randperm(slots * listed, generator=torch.Generator().manual_seed(1))
    made.table.copy_(order.view(slots, listed))
    return made


STATES = ("conv", "scan", "ring_keys", "ring_values", "page_keys", "page_values", "lengths")


def states_of(slots: Slots) -> dict[str, Tensor]:
    """A copy of all that a step changes."""
    return {name: getattr(slots, name).clone() for name in STATES}
