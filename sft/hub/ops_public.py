"""The public functions of an exported `ops_phi4flash.py`: sambay_kernels' signatures on its plain torch backends.

`sft.hub.flatten` puts this file behind the backends; here it imports them from where they are.
"""

from __future__ import annotations

import math

import torch
from sambay_kernels.causal_conv1d.torch_backend import causal_conv1d_torch
from sambay_kernels.differential_attention.torch_backend import diff_attention_packed, diff_attention_step
from sambay_kernels.gmu_gate.torch_backend import gmu_gate_torch
from sambay_kernels.linear_cross_entropy.torch_backend import linear_cross_entropy_torch
from sambay_kernels.selective_scan.torch_backend import selective_scan_torch
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective scan of Mamba-1 (arXiv 2312.00752) over packed documents.

    u, delta, z (T, d_inner); A (d_inner, N); B, C (T, N); D, delta_bias (d_inner,); cu_seqlens int32 (S+1,);
    initial_state (S, d_inner, N) -> y (T, d_inner), final state (S, d_inner, N).
    """
    return selective_scan_torch(u, delta, A, B, C, D, z, delta_bias, delta_softplus, cu_seqlens, initial_state)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = "silu",
    cu_seqlens: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over packed documents.

    x (T, d); weight (d, K); initial_state (S, d, K-1) -> y (T, d), final state (S, d, K-1).
    """
    return causal_conv1d_torch(x, weight, bias, activation, cu_seqlens, initial_state)


def gmu_gate(gate: Tensor, memory: Tensor) -> Tensor:
    """silu(gate) * memory: the gated memory unit of SambaY (arXiv 2507.06607), and SwiGLU."""
    return gmu_gate_torch(gate, memory)


def differential_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Causal differential attention (arXiv 2410.05258) over packed documents.

    q (Tq, Hq, d); k, v (Tk, Hkv, d); lambda_full 0-d; subln_weight (2d,) -> (Tq, Hq*d).
    """
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
    return diff_attention_packed(
        q, k, v, lambda_full, subln_weight, lambda_init, cu_seqlens_q, cu_seqlens_k, window, scale, eps
    )


@torch.no_grad()
def differential_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lambda_full: Tensor,
    subln_weight: Tensor,
    *,
    lambda_init: float,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Differential attention of one new token a sequence: q (B, Hq, d); k, v (B, Hkv, Tk, d) -> (B, Hq*d)."""
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale
    return diff_attention_step(q, k, v, lambda_full, subln_weight, lambda_init, key_mask, scale, eps)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    reduction: str = "sum",
    chunk_size: int = 256,
) -> Tensor:
    """Cross entropy of hidden @ weight.T against labels over supervised tokens, without the full logits.

    hidden (T, H); weight (V, H); labels (T,), already aligned -> the sum, or (T,) with reduction "none".
    """
    return linear_cross_entropy_torch(
        hidden, weight, labels, ignore_index, label_smoothing, z_loss, reduction, chunk_size
    )
