"""What a decoding step reads of a model: its tensors, layer by layer.

Matrices are (out, in) as `nn.Linear` holds them, all in one type, the model's. Norms, biases and what stands outside of
matrix products may be wider.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MambaWeights:
    """A Mamba-1 mixer (arXiv 2312.00752)."""

    in_proj: Tensor  # (2 * inner, hidden): the scan's input, then the gate
    conv_weight: Tensor  # (inner, width)
    conv_bias: Tensor  # (inner,)
    x_proj: Tensor  # (rank + 2 * states, inner): delta, B, C
    dt_proj: Tensor  # (inner, rank)
    dt_bias: Tensor  # (inner,), added in float32 before the softplus
    A: Tensor  # (inner, states), -exp(A_log), float32 (float64 for float64)
    D: Tensor  # (inner,)
    out_proj: Tensor  # (hidden, inner)


@dataclass(frozen=True)
class MemoryUnitWeights:
    """A gated memory unit (arXiv 2507.06607, eq. 2)."""

    in_proj: Tensor  # (inner, hidden)
    out_proj: Tensor  # (hidden, inner)


@dataclass(frozen=True)
class AttentionWeights:
    """Differential attention (arXiv 2410.05258). Heads are paired: 2j and 2j + 1 make the two maps of pair j.

    Attributes:
        window: tokens that a query sees, itself included; None: all.
        own_keys: whether the layer makes keys and values; else it reads those of the last layer that sees everything.
    """

    qkv: Tensor  # (hidden + 2 * key_width, hidden), or (hidden, hidden) without keys of its own
    qkv_bias: Tensor
    out_proj: Tensor  # (hidden, hidden)
    out_bias: Tensor  # (hidden,)
    lambda_full: Tensor  # scalar
    subln: Tensor  # (2 * head_dim,)
    lambda_init: float
    window: int | None
    own_keys: bool


@dataclass(frozen=True)
class LayerWeights:
    """A mixer and an MLP, each behind a norm, around the float32 residual stream."""

    norm_weight: Tensor  # (hidden,)
    norm_bias: Tensor
    mixer: MambaWeights | MemoryUnitWeights | AttentionWeights
    mlp_norm_weight: Tensor
    mlp_norm_bias: Tensor
    fc1: Tensor  # (2 * intermediate, hidden): the gate, then the value
    fc2: Tensor  # (hidden, intermediate)


@dataclass(frozen=True)
class DecoderWeights:
    """All of a model. Gated memory units read the scan output (after D, before the gate) of the last Mamba layer."""

    embed: Tensor  # (vocab, hidden)
    layers: tuple[LayerWeights, ...]
    norm_weight: Tensor
    norm_bias: Tensor
    head: Tensor  # (vocab, hidden)
    eps: float
    heads: int
    key_heads: int
    head_dim: int

    @property
    def mambas(self) -> list[MambaWeights]:
        """The Mamba mixers, from the bottom up: the order of their states."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, MambaWeights)]

    @property
    def windows(self) -> list[AttentionWeights]:
        """The window layers, from the bottom up: the order of their rings."""
        return [m for m in self._own_keys if m.window is not None]

    @property
    def full(self) -> list[AttentionWeights]:
        """The layers that keep keys and values of all tokens, from the bottom up: the order of their pages."""
        return [m for m in self._own_keys if m.window is None]

    @property
    def _own_keys(self) -> list[AttentionWeights]:
        return [x.mixer for x in self.layers if isinstance(x.mixer, AttentionWeights) and x.mixer.own_keys]
