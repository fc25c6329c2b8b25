"""Differential attention without positions in vLLM: window, full, or over the keys and values of layer L/2 + 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ReplicatedLinear

from .heads import combine, grouped_keys, grouped_queries, grouped_values


class HeadNorm(nn.Module):
    """Holds the weight of the norm over a pair's outputs."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)


class DifferentialAttention(nn.Module):
    """The learned part (arXiv 2410.05258): lambda, and the norm."""

    def __init__(self, head_dim: int, layer: int) -> None:
        super().__init__()
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer)
        self.lambda_q1 = _float32(head_dim)
        self.lambda_k1 = _float32(head_dim)
        self.lambda_q2 = _float32(head_dim)
        self.lambda_k2 = _float32(head_dim)
        self.subln = HeadNorm(2 * head_dim)

    def forward(self, maps: Tensor, kv_heads: int) -> Tensor:
        """Both maps of every pair, `(T, H, width)` -> `(T, H d)`. Each exponential is rounded, as published."""
        first = torch.exp((self.lambda_q1 * self.lambda_k1).sum()).to(maps.dtype)
        second = torch.exp((self.lambda_q2 * self.lambda_k2).sum()).to(maps.dtype)
        return combine(maps, first - second + self.lambda_init, self.subln.weight, self.lambda_init, kv_heads)


def _float32(width: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(width, dtype=torch.float32), requires_grad=False)


class SambaYAttention(nn.Module):
    """A mixer of attention; parameters are named as in the checkpoint."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.heads, self.kv_heads, self.width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, head_dim, shared = (
            config.hidden_size,
            config.hidden_size // self.heads,
            config.num_hidden_layers // 2 + 1,
        )
        self.head_dim, self.is_cross = head_dim, layer > shared
        rows = 0 if self.is_cross else self.kv_heads * head_dim
        self.widths = [hidden] if self.is_cross else [hidden, rows, rows]
        self.Wqkv = ReplicatedLinear(hidden, hidden + 2 * rows, bias=True, return_bias=False, prefix=f"{prefix}.Wqkv")
        self.out_proj = ReplicatedLinear(hidden, hidden, bias=True, return_bias=False, prefix=f"{prefix}.out_proj")
        self.inner_cross_attn = DifferentialAttention(head_dim, layer)
        owner = prefix.replace(f".{layer}.", f".{shared}.")
        self.attn = Attention(
            self.heads,
            self.width,
            head_dim**-0.5,
            num_kv_heads=self.kv_heads,
            cache_config=vllm_config.cache_config,
            per_layer_sliding_window=config.window(layer),
            prefix=f"{prefix}.attn",
            kv_sharing_target_layer_name=f"{owner}.attn" if self.is_cross else None,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """`(T, hidden)` -> the same."""
        queries, *rest = (x.unflatten(-1, (-1, self.head_dim)) for x in self.Wqkv(hidden).split(self.widths, dim=-1))
        keys = values = None
        if not self.is_cross:
            keys, values = grouped_keys(rest[0], self.width), grouped_values(rest[1], self.width)
        queries = grouped_queries(queries, self.kv_heads, self.width)
        maps = self.attn(queries, keys, values).view(-1, self.heads, self.width)
        return self.out_proj(self.inner_cross_attn(maps, self.kv_heads))
