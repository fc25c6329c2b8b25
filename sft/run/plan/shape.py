"""A SambaY's shape, from its configuration alone; and its parameters, counted."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sft.utils.errors import UserError

FLOAT32 = 4


@dataclass(frozen=True)
class Matrix:
    """The weight of a linear layer: `layer`, its module's name, rows (out) and columns (in)."""

    layer: int
    name: str
    out: int
    width: int
    bias: bool = False

    @property
    def numel(self) -> int:
        """How many values, without the bias."""
        return self.out * self.width


@dataclass(frozen=True)
class Shape:
    """As `Phi4FlashConfig`, whose defaults these are: those of Phi-4-mini-flash-reasoning."""

    vocab_size: int = 200064
    hidden_size: int = 2560
    intermediate_size: int = 10240
    num_hidden_layers: int = 32
    num_attention_heads: int = 40
    num_key_value_heads: int = 20
    sliding_window: int = 512
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_dt_rank: int = 160
    tie_word_embeddings: bool = True

    @classmethod
    def of(cls, config: Mapping[str, Any], where: str) -> Shape:
        """From what a config.json or `model.config` says. Raises UserError for a model that isn't SambaY."""
        kind = config.get("model_type", "phi4flash")
        if kind != "phi4flash":
            raise UserError(f"{where} is a {kind}: sft plan knows SambaY models (phi4flash) alone.")
        said = {name: config[name] for name in cls.__dataclass_fields__ if config.get(name) is not None}
        if isinstance(said.get("sliding_window"), list | tuple):
            said["sliding_window"] = max(width or 0 for width in said["sliding_window"])
        if said.get("mamba_dt_rank", "auto") == "auto":
            said["mamba_dt_rank"] = math.ceil(said.get("hidden_size", cls.hidden_size) / 16)
        wrong = [name for name, value in said.items() if isinstance(value, str) or value < 0]
        if wrong:
            raise UserError(f"{where}: {wrong[0]} is {said[wrong[0]]!r}, which is no number of a model's shape.")
        return cls(**said)

    @property
    def inner(self) -> int:
        """Channels of a scan."""
        return self.mamba_expand * self.hidden_size

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_width(self) -> int:
        """Width of a layer's keys."""
        return self.num_key_value_heads * self.head_dim

    @property
    def memory_layer(self) -> int:
        """The Mamba layer whose scan output gated memory units read."""
        return self.num_hidden_layers // 2

    @property
    def shared_layer(self) -> int:
        """The attention layer whose keys and values later ones read; from here on only kept tokens are computed."""
        return self.memory_layer + 1

    def kind(self, layer: int) -> str:
        """`mamba`, `gmu`, `window`, `full` or `cross`."""
        if layer % 2 == 0:
            return "mamba" if layer <= self.memory_layer else "gmu"
        return "window" if layer < self.shared_layer else "full" if layer == self.shared_layer else "cross"

    def matrices(self) -> Iterator[Matrix]:
        """Every linear layer but the head."""
        for layer in range(self.num_hidden_layers):
            yield from self.matrices_of(layer).values()

    def matrices_of(self, layer: int) -> dict[str, Matrix]:
        """The linear layers of a layer, by their module's name."""
        hidden, inner, kind = self.hidden_size, self.inner, self.kind(layer)
        states, rank = self.mamba_d_state, self.mamba_dt_rank
        if kind == "mamba":
            made = [("in_proj", 2 * inner, hidden, False), ("x_proj", rank + 2 * states, inner, False)]
            made += [("dt_proj", inner, rank, True), ("out_proj", hidden, inner, False)]
        elif kind == "gmu":
            made = [("in_proj", inner, hidden, False), ("out_proj", hidden, inner, False)]
        else:
            keys = 0 if kind == "cross" else 2 * self.kv_width
            made = [("Wqkv", hidden + keys, hidden, True), ("out_proj", hidden, hidden, True)]
        made += [("fc1", 2 * self.intermediate_size, hidden, False), ("fc2", hidden, self.intermediate_size, False)]
        return {name: Matrix(layer, name, *rest) for name, *rest in made}  # type: ignore[arg-type]

    @property
    def embedding(self) -> int:
        """Values of the embedding, which is the head too where they are tied."""
        return self.vocab_size * self.hidden_size

    @property
    def always_float32(self) -> int:
        """Values that are in float32 whatever the rest is in: A_log and the lambdas."""
        mambas = self.memory_layer // 2 + 1
        attentions = self.num_hidden_layers // 2
        return mambas * self.inner * self.mamba_d_state + attentions * 4 * self.head_dim

    @property
    def decaying(self) -> int:
        """Values of matrices, convolutions and embeddings, which are what `weights_dtype` is about."""
        heads = 1 if self.tie_word_embeddings else 2
        convolutions = (self.memory_layer // 2 + 1) * self.inner * self.mamba_d_conv
        return sum(matrix.numel for matrix in self.matrices()) + convolutions + heads * self.embedding

    @property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        linear = sum(matrix.numel + matrix.out * matrix.bias for matrix in self.matrices())
        mambas, attentions = self.memory_layer // 2 + 1, self.num_hidden_layers // 2
        norms = (2 * self.num_hidden_layers + 1) * 2 * self.hidden_size + attentions * 2 * self.head_dim
        convolutions = mambas * self.inner * (self.mamba_d_conv + 1 + 1)  # weight, bias; and the scan's D
        heads = 1 if self.tie_word_embeddings else 2
        return linear + norms + convolutions + self.always_float32 + heads * self.embedding
