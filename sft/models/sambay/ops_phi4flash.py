"""The ops the model is built on. In the package they are those of `sambay_kernels`.

An exported checkpoint carries a file of this name that holds their plain torch form, for machines without the package.
"""

from sambay_kernels import (
    add_layer_norm,
    causal_conv1d,
    causal_conv1d_step,
    differential_attention,
    differential_attention_step,
    linear_cross_entropy,
    selective_scan,
    selective_scan_step,
    swiglu,
)

__all__ = [
    "add_layer_norm",
    "causal_conv1d",
    "causal_conv1d_step",
    "differential_attention",
    "differential_attention_step",
    "linear_cross_entropy",
    "selective_scan",
    "selective_scan_step",
    "swiglu",
]
