"""SambaY (arXiv 2507.06607) in vLLM: layers 0 to L/2 + 1, and the cross-decoder above them, which owns no states.

The cross-decoder reads two things in place of states of its own: the memory, which is an activation of the same step,
and the keys and values of layer L/2 + 1, which vLLM keeps once. The residual stream is float32 from the first layer on.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sambay_kernels import add_layer_norm, swiglu
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid

from .attention import SambaYAttention
from .loading import load
from .mamba import GatedMemoryUnit, SambaYMamba, state_dtypes, state_shapes


class LayerNorm(nn.LayerNorm):
    """Reads the float32 residual stream rounded to the weights' precision, as the published model does."""

    def forward(self, hidden: Tensor, delta: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """hidden + delta `(T, hidden)` in float32, and its norm in the weights' type."""
        return add_layer_norm(hidden, delta, self.weight, self.bias, eps=self.eps)


class MLP(nn.Module):
    """SwiGLU whose gate is the first half of `fc1`."""

    def __init__(self, config: Any, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.fc1 = ReplicatedLinear(hidden, 2 * inner, bias=False, return_bias=False, prefix=f"{prefix}.fc1")
        self.fc2 = ReplicatedLinear(inner, hidden, bias=False, return_bias=False, prefix=f"{prefix}.fc2")

    def forward(self, hidden: Tensor) -> Tensor:
        """`(T, hidden)` -> the same."""
        return self.fc2(swiglu(self.fc1(hidden)))


class DecoderLayer(nn.Module):
    """A mixer and an MLP around the residual stream."""

    def __init__(self, vllm_config: VllmConfig, layer: int, prefix: str) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        half, mixer = config.num_hidden_layers // 2, f"{prefix}.attn"
        self.is_memory_source, self.is_unit = layer == half, layer % 2 == 0 and layer > half
        self.attn: nn.Module
        if layer % 2:
            self.attn = SambaYAttention(vllm_config, layer, mixer)
        else:
            self.attn = GatedMemoryUnit(config, mixer) if self.is_unit else SambaYMamba(vllm_config, mixer)
        self.input_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config, f"{prefix}.mlp")

    def forward(self, hidden: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The residual stream `(T, hidden)` in float32 and the memory `(T, inner)`, before and after the layer."""
        _, normed = self.input_layernorm(hidden)
        if self.is_unit:
            mixed = self.attn(normed, memory)
        elif isinstance(self.attn, SambaYMamba):
            mixed, made = self.attn(normed)
            memory = made if self.is_memory_source else memory
        else:
            mixed = self.attn(normed)
        hidden, normed = self.post_attention_layernorm(hidden, mixed)
        return hidden + self.mlp(normed), memory


class Phi4FlashModel(nn.Module):
    """Everything but the head."""

    def __init__(self, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        config: Any = vllm_config.model_config.hf_config
        self.cross_from = config.num_hidden_layers // 2 + 2
        self.fast_prefill = vllm_config.cache_config.kv_sharing_fast_prefill
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList([DecoderLayer(vllm_config, i, f"{prefix}.layers.{i}") for i in layers])
        self.final_layernorm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, embeds: Tensor) -> Tensor:
        """Embeddings `(T, hidden)` -> final hidden states `(T, hidden)`.

        With fast prefill the cross-decoder runs on the tokens alone whose logits are wanted, and the rows of the
        others are zeros: nothing below it reads what it computes.
        """
        memory: Tensor | None = None
        hidden = embeds.float()
        for layer in self.layers[: self.cross_from]:
            hidden, memory = layer(hidden, memory)
        kept = self._kept()
        if kept is None:
            return self.cross(hidden, memory)
        assert memory is not None
        whole = torch.zeros_like(embeds)
        whole[kept] = self.cross(hidden[kept], memory[kept])
        return whole

    def cross(self, hidden: Tensor, memory: Tensor | None) -> Tensor:
        """Of the tokens that are given, the residual stream and the memory -> final hidden states."""
        for layer in self.layers[self.cross_from :]:
            hidden, memory = layer(hidden, memory)
        return self.final_layernorm(hidden)[1]

    def _kept(self) -> Tensor | None:
        """Rows of the step whose logits are wanted, where the cross-decoder's metadata is of these alone; else None."""
        metadata = get_forward_context().attn_metadata
        if not self.fast_prefill or metadata is None:
            return None
        last: Any = self.layers[-1].attn
        of_last = metadata[last.attn.layer_name]
        rows = getattr(of_last, "logits_indices_padded", None)
        return None if rows is None else rows[: of_last.num_logits_indices]


class Phi4FlashForCausalLM(nn.Module, HasInnerState, IsHybrid):
    """SambaY with its language model head, tied to the embeddings unless the configuration says otherwise."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: Any = vllm_config.model_config.hf_config
        self.model = Phi4FlashModel(vllm_config, f"{prefix}.model" if prefix else "model")
        if self.config.tie_word_embeddings:
            self.lm_head: nn.Module = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """`(T,)` -> `(T, hidden)`."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Token ids `(T,)` of a step's requests -> final hidden states `(T, hidden)`. The model knows no positions."""
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        return self.model(inputs_embeds)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """`(n, hidden)` -> `(n, vocab)`."""
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """See `loading.load`."""
        return load(self, self.config, weights)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, ...]:
        """See `mamba.state_dtypes`."""
        return state_dtypes(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """See `mamba.state_shapes`."""
        return state_shapes(vllm_config.model_config.hf_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> Any:
        """How vLLM copies a request's two states to another slot, for prefix caching."""
        return MambaStateCopyFuncCalculator.mamba1_state_copy_func()
