"""Configuration of SambaY models (Phi-4-mini-flash-reasoning): half Mamba-1 and window attention, half shared memory.

This file travels with a pushed checkpoint; it may import only torch and transformers, and its neighbours relatively.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
)
_LARGEST = 2**31 - 1  # what the kernels index with


class Phi4FlashConfig(PretrainedConfig):
    """Shape of a SambaY model (arXiv 2507.06607). Defaults are those of Phi-4-mini-flash-reasoning.

    With L layers: even layers up to L/2 are Mamba-1, odd layers below L/2 are sliding-window differential attention,
    layer L/2+1 is full differential attention whose keys and values every later odd layer reads, and later even layers
    are gated memory units over the scan output of layer L/2.

    Args:
        sliding_window: tokens a window layer sees, itself included. An int, or (as the published class writes it back)
            a list with one entry a layer.
        layer_types: one type a layer; a layer is windowed where it says "sliding_attention". Derived when absent.
        mamba_dt_rank: "auto" is ceil(hidden_size / 16).

    Raises:
        ValueError: for a shape that is not a SambaY model.
    """

    model_type = "phi4flash"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012 (transformers adds a list to it)

    def __init__(
        self,
        vocab_size: int = 200064,
        hidden_size: int = 2560,
        intermediate_size: int = 10240,
        num_hidden_layers: int = 32,
        num_attention_heads: int = 40,
        num_key_value_heads: int = 20,
        hidden_act: str = "silu",
        max_position_embeddings: int = 262144,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-5,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        sliding_window: int | Sequence[int | None] = 512,
        layer_types: Sequence[str] | None = None,
        mb_per_layer: int = 2,
        mamba_d_state: int = 16,
        mamba_d_conv: int = 4,
        mamba_expand: int = 2,
        mamba_dt_rank: int | str = "auto",
        pad_token_id: int | None = 199999,
        bos_token_id: int | None = 199999,
        eos_token_id: int | list[int] | None = 199999,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.layer_norm_eps = layer_norm_eps
        self.use_cache = use_cache
        self.mb_per_layer = mb_per_layer
        self.mamba_d_state = mamba_d_state
        self.mamba_d_conv = mamba_d_conv
        self.mamba_expand = mamba_expand
        self._check_numbers()
        self.mamba_dt_rank = math.ceil(hidden_size / 16) if mamba_dt_rank == "auto" else mamba_dt_rank
        _check_count("mamba_dt_rank", self.mamba_dt_rank)
        self._check_shape()
        self._check_unsupported(kwargs)
        self.sliding_window = _one_window(sliding_window)
        self.layer_types = self._layer_types(sliding_window, layer_types)
        self._check_ids({"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id})
        # The published file asks for flash_attention_2 and would refuse to load without that package; which kind
        # of attention runs is decided where it runs.
        kwargs.pop("_attn_implementation", None)
        kwargs |= {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id, "eos_token_id": eos_token_id}
        kwargs["tie_word_embeddings"] = tie_word_embeddings
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one query, key or value head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def mamba_d_inner(self) -> int:
        """Channels of the scan, and of the memory that gated memory units read."""
        return self.mamba_expand * self.hidden_size

    @property
    def memory_layer(self) -> int:
        """Index of the Mamba layer whose scan output is the memory."""
        return self.num_hidden_layers // 2

    @property
    def shared_kv_layer(self) -> int:
        """Index of the full attention layer whose keys and values all later attention layers read."""
        return self.num_hidden_layers // 2 + 1

    @property
    def kv_sharing_modes(self) -> list[str | None]:
        """What each layer does with the cache, for transformers: later layers own none of it."""
        shared = self.shared_kv_layer
        return [None] * shared + ["store"] + ["reuse"] * (self.num_hidden_layers - shared - 1)

    def is_mamba(self, layer: int) -> bool:
        """Whether `layer` holds a scan or a gated memory unit (else attention)."""
        return layer % 2 == 0

    def window(self, layer: int) -> int | None:
        """How many tokens attention layer `layer` sees, itself included; None: all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def _check_numbers(self) -> None:
        for name in _COUNTS:
            _check_count(name, getattr(self, name))
        for name in ("initializer_range", "layer_norm_eps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a number above 0, not {value!r}")

    def _check_shape(self) -> None:
        if self.num_hidden_layers < 4 or self.num_hidden_layers % 4:
            raise ValueError(f"num_hidden_layers must be a positive multiple of 4, not {self.num_hidden_layers}")
        if self.mb_per_layer != 2:
            raise ValueError(f"mb_per_layer must be 2 (every second layer is Mamba), not {self.mb_per_layer}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % 2 or self.num_key_value_heads % 2:
            raise ValueError("differential attention needs even num_attention_heads and num_key_value_heads")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.hidden_act != "silu":
            raise ValueError(f"hidden_act must be silu, not {self.hidden_act}")

    @staticmethod
    def _check_ids(ids: dict[str, Any]) -> None:
        for name, value in ids.items():
            for one in value if isinstance(value, list | tuple) and name == "eos_token_id" else [value]:
                if one is not None and (isinstance(one, bool) or not isinstance(one, int) or one < 0):
                    raise ValueError(f"{name} must be a token id (a whole number from 0), not {value!r}")

    @staticmethod
    def _check_unsupported(kwargs: dict[str, Any]) -> None:
        """The published code accepts these keys and ignores them; a value that would change the maths is refused."""
        for key in ("attention_dropout", "embd_pdrop", "resid_pdrop", "mlp_bias", "lm_head_bias", "mamba_proj_bias"):
            if kwargs.get(key):
                raise ValueError(f"{key}={kwargs[key]} is not supported: SambaY models are trained with {key} off")
        if kwargs.get("mamba_conv_bias") is False:
            raise ValueError("mamba_conv_bias=false is not supported: the convolution has a bias")

    def _layer_types(self, sliding_window: int | Sequence[int | None], layer_types: Sequence[str] | None) -> list[str]:
        """The type of every layer, from whichever of the three published forms of the configuration is given."""
        types = []
        for layer in range(self.num_hidden_layers):
            below = layer < self.num_hidden_layers // 2
            if self.is_mamba(layer):
                types.append("linear_attention")
                continue
            if layer_types is not None:
                kind = _at(layer_types, layer, "layer_types")
                if kind not in ("sliding_attention", "full_attention"):
                    raise ValueError(f"layer_types: layer {layer} is attention, sliding or full, not {kind!r}")
                windowed = kind == "sliding_attention"
            elif isinstance(sliding_window, int):
                windowed = below
            else:
                windowed = _at(sliding_window, layer, "sliding_window") is not None
            if windowed and not below:
                raise ValueError(f"layer {layer} can't be a window layer: the shared keys and values reach everywhere")
            types.append("sliding_attention" if windowed else "full_attention")
        return types


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
        raise ValueError(f"{name} must be a whole number from 1 to {_LARGEST}, not {value!r}")


def _at(values: Any, layer: int, name: str) -> Any:
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list with one entry a layer, not {values!r}")
    if layer >= len(values):
        raise ValueError(f"{name} has {len(values)} entries, too few for layer {layer}")
    return values[layer]


def _one_window(sliding_window: int | Sequence[int | None]) -> int:
    """The one window width; a list (the published class saves one) must not hold two different widths."""
    told: Any = sliding_window if isinstance(sliding_window, list | tuple) else [sliding_window]
    widths = [width for width in told if width is not None]
    whole = all(isinstance(width, int) and not isinstance(width, bool) and 1 < width <= _LARGEST for width in widths)
    if not whole or len(set(widths)) != 1:
        raise ValueError(f"sliding_window must be one width of at least 2 tokens, not {sliding_window!r}")
    return int(widths[0])
