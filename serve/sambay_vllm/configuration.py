"""The configuration of SambaY models as vLLM reads it, from an export of ours or from the published config.json.

Needs transformers alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PretrainedConfig

WIDTHS = (32, 64, 96, 128, 160, 192, 224, 256)
"""Head widths that every attention backend takes, the CPU's too."""
# The published class accepts these keys and ignores them; a value that would change the maths is refused.
OFF = ("attention_dropout", "embd_pdrop", "resid_pdrop", "mlp_bias", "lm_head_bias", "mamba_proj_bias")


class Phi4FlashConfig(PretrainedConfig):
    """Shape of a SambaY model (arXiv 2507.06607). Defaults are those of Phi-4-mini-flash-reasoning.

    Args:
        sliding_window: tokens a window layer sees, itself included; an int, or a list with one entry a layer, as the
            published class writes it back.
        layer_types: one type a layer, as newer files have it; derived when absent.
        mamba_dt_rank: "auto" is ceil(hidden_size / 16).

    Attributes:
        head_dim: width of the heads in vLLM's cache (see `cache_head_width`), by which vLLM sizes its pages; the
            model's own is hidden_size / num_attention_heads.

    Raises:
        ValueError: one sentence, for a shape that is not a SambaY model or that no attention backend takes.
    """

    model_type = "phi4flash"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers adds a list to it)

    mamba_dt_rank: Any

    def __init__(self, sliding_window: Any = 512, layer_types: Any = None, **kwargs: Any) -> None:
        kwargs.pop("head_dim", None)
        kwargs.pop("_attn_implementation", None)  # the published file names one; here vLLM chooses
        for name, default in DEFAULTS.items():
            setattr(self, name, kwargs.pop(name, default))
        self._check(kwargs)
        self.layer_types = _layer_types(self.num_hidden_layers, sliding_window, layer_types)
        self.sliding_window = _one_window(sliding_window)
        self.head_dim = cache_head_width(self.hidden_size // self.num_attention_heads)
        super().__init__(**{"pad_token_id": 199999, "bos_token_id": 199999, "eos_token_id": 199999, **kwargs})

    def window(self, layer: int) -> int | None:
        """How many tokens attention layer `layer` sees, itself included; None: all."""
        return self.sliding_window if self.layer_types[layer] == "sliding_attention" else None

    def _check(self, others: dict[str, Any]) -> None:
        problems = [f"{key}={others[key]!r}, which is off in every SambaY model" for key in OFF if others.get(key)]
        rank: Any = self.mamba_dt_rank
        self.mamba_dt_rank = math.ceil(self.hidden_size / 16) if rank == "auto" else rank
        for name in COUNTS:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"config.json is not of a SambaY model: {name} must be a whole number, not {value!r}")
        heads, kv_heads, layers = self.num_attention_heads, self.num_key_value_heads, self.num_hidden_layers
        if layers % 4:
            problems.append(f"num_hidden_layers {layers}, not a multiple of 4")
        if heads % 2 or kv_heads % 2 or heads % kv_heads or self.hidden_size % heads:
            problems.append(f"{heads} heads on {kv_heads} key-value heads at width {self.hidden_size}, which don't fit")
        if self.mb_per_layer != 2 or self.hidden_act != "silu":
            problems.append(f"mb_per_layer {self.mb_per_layer!r} and hidden_act {self.hidden_act!r}, not 2 and 'silu'")
        if others.get("mamba_conv_bias") is False:
            problems.append("mamba_conv_bias=False, where the convolution has a bias")
        if problems:
            raise ValueError(f"config.json is not of a SambaY model: it has {problems[0]}")


DEFAULTS: dict[str, Any] = {
    "vocab_size": 200064,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 40,
    "num_key_value_heads": 20,
    "max_position_embeddings": 262144,
    "mamba_d_state": 16,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_dt_rank": "auto",
    "hidden_act": "silu",
    "layer_norm_eps": 1e-5,
    "mb_per_layer": 2,
    "tie_word_embeddings": True,
}
COUNTS = [name for name, value in DEFAULTS.items() if type(value) is int] + ["mamba_dt_rank"]


def cache_head_width(head_dim: int) -> int:
    """Width of a head in the cache: a pair's values are 2 `head_dim` wide, padded to what backends take.

    Keys and queries are padded with zeros to the same width: every backend takes equal widths, few take unequal ones.

    Raises:
        ValueError: no backend takes heads as wide.
    """
    for width in WIDTHS:
        if width >= 2 * head_dim:
            return width
    raise ValueError(f"heads are {head_dim} wide, and vLLM's attention takes a SambaY model's up to {WIDTHS[-1] // 2}")


def _layer_types(layers: int, window: Any, told: Any) -> list[str]:
    """The type of every layer, from whichever of the three published forms of the configuration is given."""
    source = told if told is not None else window
    if isinstance(source, Sequence) and len(source) < layers:
        raise ValueError(f"config.json has {len(source)} entries for {layers} layers in layer_types or sliding_window")
    types = []
    for layer in range(layers):
        if layer % 2 == 0:
            types.append("linear_attention")
            continue
        windowed = layer < layers // 2
        if told is not None:
            windowed = told[layer] == "sliding_attention"
        elif isinstance(window, Sequence):
            windowed = window[layer] is not None
        if windowed and layer >= layers // 2:
            raise ValueError(f"config.json is not of a SambaY model: layer {layer} has a window, and must see all")
        types.append("sliding_attention" if windowed else "full_attention")
    return types


def _one_window(told: Any) -> int:
    widths = {width for width in told if width is not None} if isinstance(told, Sequence) else {told}
    (width,) = widths if len(widths) == 1 else (None,)
    if isinstance(width, bool) or not isinstance(width, int) or width < 2:
        raise ValueError(f"config.json: sliding_window must be one width of at least 2 tokens, not {told!r}")
    return width
