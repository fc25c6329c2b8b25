"""Ops of SambaY models: token-major, packed by `cu_seqlens`, differentiable, safe under torch.compile.

Each op is a folder in `ops` with its public function, a float64-capable reference and its backends;
`runtime.dispatch` chooses one.
The package depends on torch alone (and on Triton or a compiler where it finds them).
"""

from __future__ import annotations

from .ops.add_layer_norm.api import add_layer_norm
from .ops.causal_conv1d.api import causal_conv1d
from .ops.causal_conv1d.step import causal_conv1d_step
from .ops.choose_token.api import choose_token
from .ops.choose_token.inputs import Choice
from .ops.decoder_step.api import DecoderStep
from .ops.decoder_step.slots import Slots
from .ops.decoder_step.weights import (
    AttentionWeights,
    DecoderWeights,
    LayerWeights,
    MambaWeights,
    MemoryUnitWeights,
)
from .ops.differential_attention.api import differential_attention
from .ops.differential_attention.step import differential_attention_step
from .ops.linear_cross_entropy.api import linear_cross_entropy
from .ops.linear_cross_entropy.statistics import token_statistics
from .ops.selective_scan.api import selective_scan
from .ops.selective_scan.step import selective_scan_step
from .ops.swiglu.api import swiglu
from .runtime.dispatch import BackendError, backend_for, why

__all__ = [
    "AttentionWeights",
    "BackendError",
    "Choice",
    "DecoderStep",
    "DecoderWeights",
    "LayerWeights",
    "MambaWeights",
    "MemoryUnitWeights",
    "Slots",
    "add_layer_norm",
    "backend_for",
    "causal_conv1d",
    "causal_conv1d_step",
    "choose_token",
    "differential_attention",
    "differential_attention_step",
    "linear_cross_entropy",
    "selective_scan",
    "selective_scan_step",
    "swiglu",
    "token_statistics",
    "why",
]
