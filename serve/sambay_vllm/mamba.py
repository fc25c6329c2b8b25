"""Mamba-1 (arXiv 2312.00752) in vLLM: the layer owns a convolution state and a scan state of every request."""

from __future__ import annotations

from typing import Any

import torch
from sambay_kernels import causal_conv1d, selective_scan, swiglu
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateDtypeCalculator
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from .scan import batch_of, read_states, write_states


def state_shapes(config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """Of one request in one layer: the last inputs `(inner, K - 1)`, oldest first, and the state `(inner, N)`."""
    inner = config.mamba_expand * config.hidden_size
    return (inner, config.mamba_d_conv - 1), (inner, config.mamba_d_state)


def state_dtypes(vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
    """Of the two states; the second is float32 unless another type was asked for (see `options`)."""
    cache = vllm_config.cache_config
    return MambaStateDtypeCalculator.mamba1_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    )


class SambaYMamba(nn.Module, MambaBase):
    """A Mamba-1 mixer that also hands out its scan output; parameters are named as in the checkpoint."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        hidden, inner = config.hidden_size, config.mamba_expand * config.hidden_size
        states, rank, width = config.mamba_d_state, config.mamba_dt_rank, config.mamba_d_conv
        self.prefix, self.split = prefix, [rank, states, states]
        self.in_proj = ReplicatedLinear(hidden, 2 * inner, bias=False, return_bias=False, prefix=f"{prefix}.in_proj")
        self.conv1d = nn.Conv1d(inner, inner, width, groups=inner)
        self.x_proj = ReplicatedLinear(
            inner, rank + 2 * states, bias=False, return_bias=False, prefix=f"{prefix}.x_proj"
        )
        # Its bias is added inside the scan, in float32.
        self.dt_proj = ReplicatedLinear(rank, inner, bias=True, skip_bias_add=True, prefix=f"{prefix}.dt_proj")
        self.A_log = nn.Parameter(torch.empty(inner, states, dtype=torch.float32), requires_grad=False)
        self.D = nn.Parameter(torch.empty(inner), requires_grad=False)
        self.out_proj = ReplicatedLinear(inner, hidden, bias=False, return_bias=False, prefix=f"{prefix}.out_proj")
        self.shapes, self.dtypes = state_shapes(config), state_dtypes(vllm_config)
        self.kv_cache: tuple[Tensor, ...] = ()
        vllm_config.compilation_config.static_forward_context[prefix] = self

    def forward(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """`(T, hidden)` -> the mixer's output `(T, hidden)`, and the scan's `(T, inner)` after D, before the gate."""
        inner, gate = self.in_proj(hidden).chunk(2, dim=-1)
        metadata = get_forward_context().attn_metadata
        of_layer = None if metadata is None else metadata[self.prefix]
        # vLLM measures memory by a step without requests; rows behind the last request's are padding.
        memory = torch.zeros_like(inner, memory_format=torch.contiguous_format)
        if of_layer is not None:
            batch = batch_of(of_layer)
            memory[: batch.tokens] = self._scan(inner[: batch.tokens], batch)
        return self.out_proj(swiglu(gate, memory)), memory

    def _scan(self, inner: Tensor, batch: Any) -> Tensor:
        convolution, scan = self.kv_cache
        weight, borders = self.conv1d.weight.squeeze(1), batch.borders
        before = read_states(convolution, batch)
        inner, after = causal_conv1d(
            inner, weight, self.conv1d.bias, activation="silu", cu_seqlens=borders, initial_state=before
        )
        write_states(convolution, batch, after)
        low_rank, b, c = self.x_proj(inner).split(self.split, dim=-1)
        delta, bias = self.dt_proj(low_rank.contiguous())  # vLLM's product on CPUs wants whole rows
        a = -torch.exp(self.A_log)
        before = read_states(scan, batch)
        memory, after = selective_scan(
            inner, delta, a, b, c, D=self.D, delta_bias=bias, cu_seqlens=borders, initial_state=before
        )
        write_states(scan, batch, after)
        return memory

    def get_state_shape(self) -> tuple[tuple[int, ...], ...]:
        """See `state_shapes`."""
        return self.shapes

    def get_state_dtype(self) -> tuple[torch.dtype, ...]:
        """See `state_dtypes`."""
        return self.dtypes

    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        """By which vLLM chooses the metadata of a step."""
        return MambaAttentionBackendEnum.MAMBA1


class GatedMemoryUnit(nn.Module):
    """Reads the memory of layer L/2 through a gate of its own (arXiv 2507.06607, eq. 2); owns no state."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.mamba_expand * config.hidden_size
        self.in_proj = ReplicatedLinear(hidden, inner, bias=False, return_bias=False, prefix=f"{prefix}.in_proj")
        self.out_proj = ReplicatedLinear(inner, hidden, bias=False, return_bias=False, prefix=f"{prefix}.out_proj")

    def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
        """`(T, hidden)` and the memory `(T, inner)` -> `(T, hidden)`."""
        return self.out_proj(swiglu(self.in_proj(hidden), memory))
