"""SambaY: the model of Phi-4-mini-flash-reasoning (arXiv 2507.06607), in packed form, for training and generation.

The self-decoder (layers 0 to L/2 + 1) is Mamba-1 and differential attention. It makes two things that the
cross-decoder (the layers above) reads in place of states of its own: the scan output of layer L/2 (the memory of the
gated memory units) and the keys and values of layer L/2 + 1. Nothing below reads what the cross-decoder computes, so it
computes only what is needed: in training the tokens from each document's first target on, in prefill the last token.

This file travels with a pushed checkpoint; it may import only torch and transformers, and its neighbours relatively.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.generic import can_return_tuple

from .chunked_phi4flash import can_be_chunked, mlp_in_chunks
from .configuration_phi4flash import Phi4FlashConfig
from .contract_phi4flash import (
    CACHE_FIELD,
    check_beside,
    check_labels,
    check_logits_to_keep,
    keep_columns,
    loss_divisor,
    one_cache,
    refuse_per_row_adapters,
    refuse_unknown,
    skips_logits,
    tell_no_cache,
)
from .layout_phi4flash import Documents, Layout, make_layout, next_token_targets
from .ops_phi4flash import (
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
from .shared_phi4flash import SharedTensor

IGNORE_INDEX = -100


class Phi4FlashLayerNorm(nn.LayerNorm):
    """LayerNorm that reads the fp32 residual stream rounded to the weight's precision, as the published model does."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, delta: Tensor | None = None, *, out_dtype: torch.dtype | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The normalised stream in `out_dtype` (the weight's if None); with delta, hidden + delta before it."""
        total, normed = add_layer_norm(hidden, delta, self.weight, self.bias, eps=self.eps, out_dtype=out_dtype)
        return normed if delta is None else (total, normed)


class Phi4FlashMLP(nn.Module):
    """SwiGLU whose gate is the FIRST half of `fc1`."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, recomputed: bool = False) -> Tensor:
        """`(N, hidden)` -> the same; `recomputed`: long rows in chunks, whose backward pass computes them again."""
        if recomputed and can_be_chunked(self, hidden.shape[0]):
            return mlp_in_chunks(self._gated, self.fc2, hidden)
        return self.fc2(self._gated(hidden))

    def _gated(self, hidden: Tensor) -> Tensor:
        return swiglu(self.fc1(hidden))


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution and SiLU over packed tokens; parameters as nn.Conv1d's: `(D, 1, K)` and `(D,)`."""

    def forward(self, tokens: Tensor, layout: Layout, state: Tensor | None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """`(N, D)` -> output `(N, D)` and the state after each document; in a decode step `state` itself, changed."""
        weight = self.weight.squeeze(1)
        if layout.is_step:
            assert state is not None
            return causal_conv1d_step(state, tokens, weight, self.bias, activation="silu"), state
        if layout.share is not None:
            state = layout.share.conv_state(tokens, weight.shape[1])
        return causal_conv1d(
            tokens, weight, self.bias, activation="silu", cu_seqlens=layout.cu_seqlens, initial_state=state
        )


class ReadBias:
    """Where a projection leaves the bias it didn't add. An argument, so that it passes through what wraps a module."""

    value: Tensor | None = None


class DeltaProjection(nn.Linear):
    """The projection of the time step. Its bias is added inside the scan, in fp32, and not here.

    It is read here all the same: accelerate and ZeRO-3 have a module's parameters at hand in its own forward only.
    """

    def forward(self, hidden: Tensor, bias: ReadBias) -> Tensor:  # type: ignore[override]
        bias.value = self.bias.view_as(self.bias)
        return F.linear(hidden, self.weight)


class Phi4FlashMamba(nn.Module):
    """Mamba-1 (arXiv 2312.00752). Projections are called as modules, so that adapters on them are live."""

    def __init__(self, config: Phi4FlashConfig, layer_idx: int) -> None:
        super().__init__()
        inner, state, rank = config.mamba_d_inner, config.mamba_d_state, int(config.mamba_dt_rank)
        self.layer_idx = layer_idx
        self.split = [rank, state, state]
        self.in_proj = nn.Linear(config.hidden_size, 2 * inner, bias=False)
        self.conv1d = CausalConv1d(inner, inner, config.mamba_d_conv, groups=inner, padding=config.mamba_d_conv - 1)
        self.x_proj = nn.Linear(inner, rank + 2 * state, bias=False)
        self.dt_proj = DeltaProjection(rank, inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(inner, state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, layout: Layout, cache: Cache | None) -> tuple[Tensor, Tensor]:
        """`(N, hidden)` -> the mixer's output `(N, hidden)`, and the scan's `(N, inner)` after D, before the gate."""
        conv_state, scan_state = _mamba_states(cache, self.layer_idx, layout)
        inner, gate = self.in_proj(hidden).chunk(2, dim=-1)
        inner, conv_state = self.conv1d(inner, layout, conv_state)
        memory, scan_state = self._scan(inner, layout, scan_state)
        if cache is not None and not layout.is_step:  # a step has changed the cache's own states
            cache.update_conv_state(conv_state, self.layer_idx)
            cache.update_recurrent_state(scan_state, self.layer_idx)
        return self.out_proj(swiglu(gate, memory)), memory

    def _scan(self, inner: Tensor, layout: Layout, state: Tensor | None) -> tuple[Tensor, Tensor]:
        """`(N, inner)` -> output `(N, inner)` and the state after each document; in a step `state` itself, changed."""
        delta, b, c = self.x_proj(inner).split(self.split, dim=-1)
        a = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        bias = ReadBias()
        inputs = (inner, self.dt_proj(delta, bias), a, b, c)
        if layout.is_step:
            assert state is not None
            return selective_scan_step(state, *inputs, D=self.D, delta_bias=bias.value), state
        if layout.share is not None:
            state = layout.share.scan_state(*inputs, delta_bias=bias.value)
        return selective_scan(
            *inputs, D=self.D, delta_bias=bias.value, cu_seqlens=layout.cu_seqlens, initial_state=state
        )


class Phi4FlashGatedMemoryUnit(nn.Module):
    """Gated memory unit: reads the memory of layer L/2 through a gate of its own (arXiv 2507.06607, eq. 2)."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__()
        self.in_proj = nn.Linear(config.hidden_size, config.mamba_d_inner, bias=False)
        self.out_proj = nn.Linear(config.mamba_d_inner, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor, memory: Tensor) -> Tensor:
        return self.out_proj(swiglu(self.in_proj(hidden), memory))


class HeadNorm(nn.Module):
    """Holds the weight of the RMSNorm over a differential head's 2d outputs; the attention op applies it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self) -> Tensor:
        """The weight `(2d,)`, read in its own module's forward."""
        return self.weight.view_as(self.weight)


class DifferentialAttention(nn.Module):
    """The learned part of differential attention (arXiv 2410.05258): lambda, and the norm of each differential head."""

    def __init__(self, head_dim: int, layer_idx: int) -> None:
        super().__init__()
        self.lambda_init = 0.8 - 0.6 * math.exp(-0.3 * layer_idx)
        self.lambda_q1 = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))
        self.lambda_k1 = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))
        self.lambda_q2 = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))
        self.lambda_k2 = nn.Parameter(torch.empty(head_dim, dtype=torch.float32))
        self.subln = HeadNorm(2 * head_dim)

    def lambda_full(self, dtype: torch.dtype) -> Tensor:
        """exp(q1.k1) - exp(q2.k2) + lambda_init; each exponential is rounded to `dtype`, as published."""
        first = torch.exp((self.lambda_q1 * self.lambda_k1).sum()).to(dtype)
        second = torch.exp((self.lambda_q2 * self.lambda_k2).sum()).to(dtype)
        return first - second + self.lambda_init

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor, *, step: bool, **where: Any) -> Tensor:
        """Packed attention, or one query for each row of a cache.

        Shapes as in `sambay_kernels.differential_attention` and `differential_attention_step`.
        """
        op = differential_attention_step if step else differential_attention
        return op(
            queries,
            keys,
            values,
            self.lambda_full(queries.dtype),
            self.subln(),
            lambda_init=self.lambda_init,
            **where,
        )


class Phi4FlashAttention(nn.Module):
    """Differential attention without positions (NoPE): window, full, or over the shared keys and values."""

    def __init__(self, config: Phi4FlashConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.window = config.window(layer_idx)
        self.is_shared_source = layer_idx == config.shared_kv_layer
        self.is_cross = layer_idx > config.shared_kv_layer
        kv_width = 0 if self.is_cross else config.num_key_value_heads * config.head_dim
        self.widths = [config.hidden_size] if self.is_cross else [config.hidden_size, kv_width, kv_width]
        self.Wqkv = nn.Linear(config.hidden_size, config.hidden_size + 2 * kv_width, bias=True)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=True)
        self.inner_cross_attn = DifferentialAttention(config.head_dim, layer_idx)

    def forward(
        self,
        hidden: Tensor,
        layout: Layout,
        cache: Cache | None,
        keys: Tensor | None,
        values: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(N, hidden)` and, in cross layers, the shared keys and values -> output, keys, values.

        Keys and values are packed `(N, heads, d)`, or as cached `(B, heads, columns, d)` once the cache holds a past.
        """
        if self.is_cross:
            assert keys is not None and values is not None
            queries = self._heads(self.Wqkv(hidden))
        else:
            queries, keys, values = (self._heads(x) for x in self.Wqkv(hidden).split(self.widths, dim=-1))
            if cache is not None:
                keys, values = self._update_cache(cache, keys, values, layout)
            if layout.share is not None:
                keys, values = layout.share.keys_before(keys, values, self.window)
            if self.is_shared_source:
                queries = layout.keep(queries)
        return self.out_proj(self._attend(queries, keys, values, layout)), keys, values

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))

    def _update_cache(self, cache: Cache, keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
        """Append to the cache; during the first prefill the packed keys and values are all there is to attend to."""
        new_keys, new_values = (layout.unpack(x).transpose(1, 2) for x in (keys, values))
        all_keys, all_values = cache.update(new_keys, new_values, self.layer_idx)
        return (keys, values) if layout.past_length == 0 else (all_keys, all_values)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
        cross = self.is_cross or self.is_shared_source
        cu_queries = layout.query_cu_seqlens if cross else layout.cu_seqlens
        cu_keys = layout.key_cu_seqlens(self.window)
        if keys.dim() == 4:
            if layout.is_step:
                return self._step(queries, keys, values, layout)
            keys, values, cu_keys = _pack_cached(keys, values, layout)
        return self.inner_cross_attn(
            queries,
            keys,
            values,
            step=False,
            cu_seqlens_q=cu_queries,
            cu_seqlens_k=cu_keys,
            window=self.window,
            max_length_q=layout.longest,
            max_length_k=layout.longest,
        )

    def _step(self, queries: Tensor, keys: Tensor, values: Tensor, layout: Layout) -> Tensor:
        columns = keys.shape[2] if self.window is None else min(self.window, keys.shape[2])
        mask = None if layout.key_mask is None else layout.key_mask[:, -columns:]
        keys, values = keys[:, :, -columns:], values[:, :, -columns:]
        return self.inner_cross_attn(queries, keys, values, step=True, key_mask=mask)


def _pack_cached(keys: Tensor, values: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Cached `(B, heads, columns, d)` -> packed `(N, heads, d)` without padding, and the documents' boundaries."""
    rows, _, columns, _ = keys.shape
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    if layout.key_mask is None:
        return keys, values, torch.arange(0, rows * columns + 1, columns, dtype=torch.int32, device=keys.device)
    mask = layout.key_mask[:, -columns:]
    index = mask.reshape(-1).nonzero().squeeze(1)
    boundaries = F.pad(mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return keys.index_select(0, index), values.index_select(0, index), boundaries


def _mamba_states(cache: Cache | None, layer_idx: int, layout: Layout) -> tuple[Tensor | None, Tensor | None]:
    """The cache's states after the tokens it holds, `(B, inner, K-1)` and `(B, inner, N)`; None before the first."""
    if cache is None or layout.past_length == 0:
        return None, None
    layer: Any = cache.layers[layer_idx]
    return layer.conv_states[0], layer.recurrent_states[0]


class Phi4FlashDecoderLayer(GradientCheckpointingLayer):
    """A mixer and an MLP around an fp32 residual stream."""

    def __init__(self, config: Phi4FlashConfig, layer_idx: int) -> None:
        super().__init__()
        self.is_mamba = config.is_mamba(layer_idx)
        self.is_gmu = self.is_mamba and layer_idx > config.memory_layer
        self.is_memory_source = layer_idx == config.memory_layer
        self.is_shared_source = layer_idx == config.shared_kv_layer
        self.is_cross = not self.is_mamba and layer_idx > config.shared_kv_layer
        self.input_layernorm = Phi4FlashLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attn: nn.Module
        if self.is_gmu:
            self.attn = Phi4FlashGatedMemoryUnit(config)
        elif self.is_mamba:
            self.attn = Phi4FlashMamba(config, layer_idx)
        else:
            self.attn = Phi4FlashAttention(config, layer_idx)
        self.post_attention_layernorm = Phi4FlashLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = Phi4FlashMLP(config)

    def forward(
        self,
        hidden: Tensor,
        memory: Tensor | None,
        keys: Tensor | None,
        values: Tensor | None,
        layout: Layout,
        product_dtype: torch.dtype,
        past_key_values: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Returns hidden and, from the layers that make what others read, memory, or keys and values; else None.

        What is returned lives until the backward pass, and what is taken too where the layer is recomputed there: so a
        layer gets and gives no more than is read. The norms write `product_dtype`. The tensors that layers share pass
        through flat: reentrant checkpointing, should anyone force it, loses the gradient of tensors that travel in a
        container.
        """
        mixed = self.input_layernorm(hidden, out_dtype=product_dtype)
        if self.is_gmu:
            mixed = self.attn(mixed, memory)
        elif self.is_mamba:
            mixed, memory = self.attn(mixed, layout, past_key_values)
        else:
            mixed, keys, values = self.attn(mixed, layout, past_key_values, keys, values)
        if not self.is_memory_source:
            memory = None
        if self.is_shared_source:
            hidden = layout.keep(hidden)
        else:
            keys = values = None
        # The residual stream is fp32 (at least) from the first layer on.
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        hidden, normed = self.post_attention_layernorm(hidden, mixed, out_dtype=product_dtype)
        return hidden + self.mlp(normed, self.gradient_checkpointing and self.training), memory, keys, values


class Phi4FlashPreTrainedModel(PreTrainedModel):
    """What transformers has to know of SambaY models."""

    config_class = Phi4FlashConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Phi4FlashDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = True  # a recurrent state can't be rolled back: no assisted decoding
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = False
    _keep_in_fp32_modules_strict = ["A_log", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """From-scratch weights: N(0, initializer_range); for the time step those of Mamba (arXiv 2312.00752, 3.6)."""
        super()._init_weights(module)
        if isinstance(module, DifferentialAttention):
            for parameter in (module.lambda_q1, module.lambda_k1, module.lambda_q2, module.lambda_k2):
                init.normal_(parameter, mean=0.0, std=0.1)
        elif isinstance(module, HeadNorm):
            init.ones_(module.weight)
        elif isinstance(module, DeltaProjection):
            bound = module.in_features**-0.5
            init.uniform_(module.weight, -bound, bound)
            steps = torch.exp(torch.empty_like(module.bias).uniform_(math.log(1e-3), math.log(1e-1)))
            init.copy_(module.bias, steps + torch.log(-torch.expm1(-steps)))  # inverse of softplus
        elif isinstance(module, Phi4FlashMamba):
            states = torch.arange(1, module.A_log.shape[1] + 1, dtype=torch.float32, device=module.A_log.device)
            init.copy_(module.A_log, torch.log(states).expand_as(module.A_log))
            init.ones_(module.D)

    def _set_gradient_checkpointing(  # type: ignore[override]
        self, enable: bool = True, gradient_checkpointing_func: Any = checkpoint, **kwargs: Any
    ) -> None:
        """Where every way of switching checkpointing on ends; the reentrant form is refused here.

        Raises:
            ValueError: when the reentrant form is asked for.
        """
        options = getattr(gradient_checkpointing_func, "keywords", {})
        if enable and options.get("use_reentrant", False):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True loses the gradients of the keys, values and memory "
                "that SambaY layers share; use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if enable and "use_reentrant" not in options:
            gradient_checkpointing_func = functools.partial(gradient_checkpointing_func, use_reentrant=False)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


@dataclass
class Phi4FlashModelOutput(BaseModelOutputWithPast):
    """Output of the backbone. With `labels` given, `targets` is what each token of `last_hidden_state` has to predict:
    `(B, T)`, or `(K,)` where only the K tokens that a loss reads are computed, and packed: `(K, hidden)`; and
    `beside_targets` what was given beside those labels, `(B, T, ...)` or `(K, ...)`."""

    targets: Tensor | None = None
    beside_targets: dict[str, Tensor] | None = None


class Phi4FlashModel(Phi4FlashPreTrainedModel):
    """The backbone: token ids to final hidden states."""

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__(config)
        # No padding_idx: pad is also the end-of-text token, whose row must go on learning.
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Phi4FlashDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.final_layernorm = Phi4FlashLayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        beside_labels: Mapping[str, Tensor] | None = None,
        supervised_only: bool = True,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        **kwargs: Any,
    ) -> Phi4FlashModelOutput:
        """Run the layers on packed or padded tokens; `**kwargs` are those of `Documents`, all others are refused.

        Args:
            input_ids: `(B, T)`; or inputs_embeds `(B, T, hidden)`.
            attention_mask: `(B, T)`, left or right padding; with a cache `(B, past + T)`.
            position_ids: not used by the maths (NoPE); where they don't go on by one, a document begins.
            past_key_values: a DynamicCache; or `cache`, its name since transformers 5.24.
            labels: `(B, T)`: return the targets of a loss on them too; shift_labels: the targets themselves.
            beside_labels: `(B, T, ...)`: what is said of each of those labels, returned as they are.
            supervised_only: with labels, compute in the cross-decoder only what that loss reads.
            logits_to_keep: an int: without labels, compute in the cross-decoder only the last so many columns; 0: all.
        Returns:
            last_hidden_state `(B, T, hidden)`, or `(B, logits_to_keep, hidden)`; zero on padding.
        Raises:
            ValueError: on inputs that contradict one another or can't be honoured; TypeError on unknown ones.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if self._wanted("output_attentions", output_attentions):
            raise ValueError("output_attentions is not available: attention weights are never materialised")
        every_state = self._wanted("output_hidden_states", output_hidden_states)
        check_logits_to_keep(logits_to_keep)
        embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        check_labels(embeds.shape[:2], labels=labels, shift_labels=shift_labels)
        past = one_cache(past_key_values, kwargs.pop("cache", None), self.config)
        layout = self._layout(embeds, past, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        past = self._own_cache(use_cache, layout) if past is None else past
        read_by_loss = _read_by_loss(labels, shift_labels, beside_labels or {}, layout)
        targets = read_by_loss.get("targets")
        supervised_only = supervised_only and not every_state
        if every_state:
            logits_to_keep = 0
        elif targets is not None and supervised_only:
            layout = layout.keep_supervised(targets, IGNORE_INDEX)
        elif targets is None and isinstance(logits_to_keep, int) and logits_to_keep:
            layout = layout.keep_last(logits_to_keep)
        hidden, read = self._run(layout.pack(embeds), layout, past, every_state)
        hidden, read_by_loss = _laid_out(hidden, read_by_loss, layout, supervised_only)
        output: dict[str, Any] = {CACHE_FIELD: past, "targets": read_by_loss.pop("targets", None)}
        output["beside_targets"] = read_by_loss or None
        states = (*read, hidden) if every_state else None
        return Phi4FlashModelOutput(last_hidden_state=hidden, hidden_states=states, **output)

    def _layout(self, embeds: Tensor, past: Cache | None, **told: Any) -> Layout:
        """Where the tokens lie and which documents they form; what can't be honoured is refused."""
        refuse_unknown({name: value for name, value in told.items() if name not in _OF_DOCUMENTS}, _KEYWORDS)
        documents = Documents(**{name: told[name] for name in _OF_DOCUMENTS & told.keys()})
        past_length = 0 if past is None else past.get_seq_length()
        layout = make_layout((embeds.shape[0], embeds.shape[1]), embeds.device, documents, past_length)
        if past is not None and layout.packed:
            raise ValueError("packed documents can't come with a cache: its rows hold one document each")
        if not layout.is_step:
            refuse_per_row_adapters(self)
        return layout

    def _wanted(self, option: str, given: bool | None) -> bool:
        return bool(getattr(self.config, option, False) if given is None else given)

    def _own_cache(self, use_cache: bool | None, layout: Layout) -> DynamicCache | None:
        """A new cache where one is asked for, or is the configuration's default and of use."""
        if use_cache and layout.packed:
            raise ValueError("use_cache: packed documents have no cache, its rows hold one document each")
        wanted = self.config.use_cache and not self.training and not layout.packed if use_cache is None else use_cache
        if wanted and self.gradient_checkpointing and self.training:
            tell_no_cache()
            return None
        return DynamicCache(config=self.config) if wanted else None

    def _run(
        self, hidden: Tensor, layout: Layout, past_key_values: Cache | None, output_hidden_states: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Packed embeddings `(N, hidden)` -> final hidden states of the kept tokens `(K, hidden)`.

        And, where they are wanted, what each layer read, `(B, T, hidden)`.
        """
        compute_dtype, product_dtype = hidden.dtype, _product_dtype(hidden)
        memory: Any = None
        keys = values = None
        shared: SharedTensor | None = None
        states: list[Tensor] = []
        for layer in self.layers:
            if output_hidden_states:
                states.append(layout.unpack(hidden))
                hidden = layout.pack(states[-1])  # the layer reads what is handed out, so that it can have a gradient
            read = None if not layer.is_gmu else memory if shared is None else shared.read()
            over = (keys, values) if layer.is_cross else (None, None)
            hidden, made, *new = layer(hidden, read, *over, layout, product_dtype, past_key_values=past_key_values)
            memory = made if layer.is_memory_source else memory
            if layer.is_shared_source:
                keys, values = new
                assert memory is not None
                memory = layout.keep(memory)
                if memory.requires_grad and memory.dtype in (torch.bfloat16, torch.float16):
                    shared = SharedTensor(memory)
        return self.final_layernorm(hidden, out_dtype=compute_dtype), states


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """What a linear layer computes in, given this: autocast's type where it is on for the device, else hidden's."""
    device = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return hidden.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _read_by_loss(
    labels: Tensor | None, shift_labels: Tensor | None, beside: Mapping[str, Tensor], layout: Layout
) -> dict[str, Tensor]:
    """`targets`, what each packed token `(N,)` has to predict, and what stands beside them `(N, ...)`; empty without.

    Anything may stand beside the last token of a document, which predicts nothing.
    """
    packed = {name: layout.pack(value) for name, value in beside.items()}
    if shift_labels is not None:
        return {**packed, "targets": layout.pack(shift_labels)}
    if labels is None:
        return {}
    if layout.share is not None:
        raise ValueError("row_share needs shift_labels: a share's last token predicts the first one of the next share")
    targets = next_token_targets(labels, layout, IGNORE_INDEX)
    return {**{name: value.roll(-1, 0) for name, value in packed.items()}, "targets": targets}


def _laid_out(
    hidden: Tensor, read_by_loss: dict[str, Tensor], layout: Layout, supervised_only: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the backbone returns of the final hidden states and of what a loss reads."""
    if not read_by_loss:
        return layout.unpack_kept(hidden), {}
    if supervised_only:
        return hidden, {name: layout.keep(value) for name, value in read_by_loss.items()}
    unpacked = {name: layout.unpack(value, padding=IGNORE_INDEX) for name, value in read_by_loss.items()}
    return layout.unpack(hidden), unpacked


class LanguageModelHead(nn.Linear):
    """The output projection. With targets it returns their summed cross entropy and never makes the logits whole."""

    def forward(  # type: ignore[override]
        self, hidden: Tensor, targets: Tensor | None = None, **options: Any
    ) -> Tensor:
        if targets is None:
            return F.linear(hidden, self.weight)
        return linear_cross_entropy(hidden, self.weight, targets, ignore_index=IGNORE_INDEX, **options)


class Phi4FlashForCausalLM(Phi4FlashPreTrainedModel, GenerationMixin):
    """SambaY with its tied language model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: Phi4FlashConfig) -> None:
        super().__init__(config)
        self.model = Phi4FlashModel(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        z_loss: float = 0.0,
        loss_weights: Tensor | None = None,
        teacher_ids: Tensor | None = None,
        teacher_logprobs: Tensor | None = None,
        loss_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and with labels the loss; `**kwargs`: of `Phi4FlashModel`.

        Args:
            labels: `(B, T)`, not shifted; -100 where no loss is wanted. A document's first token is never predicted.
                Or shift_labels `(B, T)`: what each token has to predict.
            logits_to_keep: compute logits of the last so many columns only (0: all), or of the columns in a tensor.
            num_items_in_batch: supervised tokens (or the sum of their weights) of the whole, accumulated, batch, which
                the summed loss is divided by; default: those given here.
            skip_logits: with labels, compute the loss alone, in chunks, on supervised tokens only, and skip the
                cross-decoder for tokens before a document's first supervised one. Default: in training.
            z_loss, label_smoothing (a keyword), loss_options (the rest): of `sambay_kernels.linear_cross_entropy`.
            loss_weights, teacher_ids, teacher_logprobs: of each label, `(B, T)` or `(B, T, k)`.
        Returns:
            loss: scalar; logits `(B, T or columns kept, vocab)`, None where skipped.
        """
        # No parameter: transformers' Trainer takes all that are named so for labels, and misses them in evaluation.
        smoothing = kwargs.pop("label_smoothing", None) or 0.0
        of_labels = kwargs.get("shift_labels") if labels is None else labels
        with_loss = of_labels is not None
        loss_only = skips_logits(skip_logits, with_loss, self.training)
        beside = {"weights": loss_weights, "teacher_ids": teacher_ids, "teacher_logprobs": teacher_logprobs}
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=False if with_loss and use_cache is None else use_cache,
            labels=labels,
            beside_labels=check_beside(of_labels, beside),
            supervised_only=loss_only,
            logits_to_keep=logits_to_keep,
            return_dict=True,
            **kwargs,
        )
        options = {"label_smoothing": smoothing, "z_loss": z_loss, **(loss_options or {})}
        loss = self._loss(output, num_items_in_batch, options) if with_loss else None
        logits = None if loss_only else self.lm_head(keep_columns(output.last_hidden_state, logits_to_keep))
        past: dict[str, Any] = {CACHE_FIELD: getattr(output, CACHE_FIELD)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=output.hidden_states, **past)

    def _loss(self, output: Phi4FlashModelOutput, count: Tensor | int | None, options: dict[str, Any]) -> Tensor:
        """The summed loss over its divisor, of what the backbone says of the targets."""
        tokens, targets, beside = output.last_hidden_state, output.targets, output.beside_targets or {}
        assert tokens is not None and targets is not None
        flat = {name: value.flatten(0, targets.dim() - 1) for name, value in beside.items()}
        summed = self.lm_head(tokens.flatten(0, targets.dim() - 1), targets.flatten(), **options, **flat)
        return summed / loss_divisor(count, targets.flatten() != IGNORE_INDEX, flat.get("weights"), summed)


_OF_DOCUMENTS = {field.name for field in fields(Documents)}
_FORWARDS = (Phi4FlashForCausalLM.forward, Phi4FlashModel.forward)
# What a misspelt keyword is compared with.
_NAMES = {name for forward in _FORWARDS for name in inspect.signature(forward).parameters}
_KEYWORDS = (_OF_DOCUMENTS | _NAMES | {"cache", "label_smoothing"}) - {"self", "kwargs"}

__all__ = ["Phi4FlashForCausalLM", "Phi4FlashModel", "Phi4FlashPreTrainedModel"]
