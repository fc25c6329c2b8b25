"""What the engine reads of a SambaY model: its weights for decoding steps, and a prefilled prompt's states."""

from __future__ import annotations

from typing import Any

import torch
from sambay_kernels import (
    AttentionWeights,
    DecoderWeights,
    LayerWeights,
    MambaWeights,
    MemoryUnitWeights,
    Slots,
)
from torch import Tensor, nn

from sft.models.sambay import Phi4FlashForCausalLM
from sft.models.sambay.modeling_phi4flash import (
    DifferentialAttention,
    Phi4FlashAttention,
    Phi4FlashDecoderLayer,
    Phi4FlashGatedMemoryUnit,
    Phi4FlashMamba,
)


def decoder_weights(model: Any) -> DecoderWeights | None:
    """The model's tensors, not copied but for what is small; None where a step of its own can't stand for its forward.

    That is another family's model, and one whose linear layers are more than a matrix: adapters, quantised weights.
    """
    if type(model) is not Phi4FlashForCausalLM or any(type(m) not in _KNOWN for m in model.modules()):
        return None
    config, base = model.config, model.model
    with torch.no_grad():
        layers = tuple(_layer(layer) for layer in base.layers)
    return DecoderWeights(
        embed=base.embed_tokens.weight.detach(),
        layers=layers,
        norm_weight=base.final_layernorm.weight.detach(),
        norm_bias=base.final_layernorm.bias.detach(),
        head=model.lm_head.weight.detach(),
        eps=config.layer_norm_eps,
        heads=config.num_attention_heads,
        key_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
    )


def _layer(layer: Phi4FlashDecoderLayer) -> LayerWeights:
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    return LayerWeights(
        norm_weight=first.weight.detach(),
        norm_bias=first.bias.detach(),
        mixer=_mixer(layer.attn),
        mlp_norm_weight=second.weight.detach(),
        mlp_norm_bias=second.bias.detach(),
        fc1=layer.mlp.fc1.weight.detach(),
        fc2=layer.mlp.fc2.weight.detach(),
    )


def _mixer(mixer: Any) -> MambaWeights | MemoryUnitWeights | AttentionWeights:
    if isinstance(mixer, Phi4FlashGatedMemoryUnit):
        return MemoryUnitWeights(mixer.in_proj.weight.detach(), mixer.out_proj.weight.detach())
    if isinstance(mixer, Phi4FlashMamba):
        assert mixer.conv1d.bias is not None
        return MambaWeights(
            in_proj=mixer.in_proj.weight.detach(),
            conv_weight=mixer.conv1d.weight.detach().squeeze(1),
            conv_bias=mixer.conv1d.bias.detach(),
            x_proj=mixer.x_proj.weight.detach(),
            dt_proj=mixer.dt_proj.weight.detach(),
            dt_bias=mixer.dt_proj.bias.detach(),
            A=-torch.exp(mixer.A_log.detach().to(torch.promote_types(mixer.A_log.dtype, torch.float32))),
            D=mixer.D.detach(),
            out_proj=mixer.out_proj.weight.detach(),
        )
    assert isinstance(mixer, Phi4FlashAttention)
    inner: DifferentialAttention = mixer.inner_cross_attn
    return AttentionWeights(
        qkv=mixer.Wqkv.weight.detach(),
        qkv_bias=mixer.Wqkv.bias.detach(),
        out_proj=mixer.out_proj.weight.detach(),
        out_bias=mixer.out_proj.bias.detach(),
        lambda_full=inner.lambda_full(mixer.Wqkv.weight.dtype).detach(),
        subln=inner.subln.weight.detach(),
        lambda_init=inner.lambda_init,
        window=mixer.window,
        own_keys=not mixer.is_cross,
    )


def load_slot(cache: Any, config: Any, slots: Slots, slot: int) -> None:
    """Put the states of a prefilled prompt, the one row of `cache`, into a slot whose pages the table lists already."""
    mambas = windows = full = 0
    length = cache.get_seq_length()
    size = slots.page_size
    pages = slots.table[slot, : -(-length // size)].long()
    for index in range(config.shared_kv_layer + 1):
        layer = cache.layers[index]
        if config.is_mamba(index):
            slots.conv[mambas, slot] = layer.conv_states[0][0].to(slots.conv.dtype)
            slots.scan[mambas, slot] = layer.recurrent_states[0][0]
            mambas += 1
        elif config.window(index) is not None:
            _into_ring(slots.ring_keys[windows, slot], layer.keys[0], length)
            _into_ring(slots.ring_values[windows, slot], layer.values[0], length)
            windows += 1
        else:
            _into_pages(slots.page_keys[full], layer.keys[0], pages, size)
            _into_pages(slots.page_values[full], layer.values[0], pages, size)
            full += 1
    slots.lengths[slot] = length


def _into_ring(ring: Tensor, kept: Tensor, length: int) -> None:
    """The last tokens' (heads, kept, d) into a ring (heads, window, d): token t stands at t mod window."""
    count = min(kept.shape[1], ring.shape[1])
    places = torch.arange(length - count, length, device=ring.device) % ring.shape[1]
    ring[:, places] = kept[:, kept.shape[1] - count :].to(ring.dtype)


def _into_pages(pool: Tensor, kept: Tensor, pages: Tensor, size: int) -> None:
    """All tokens' (heads, tokens, d) into the listed pages of a pool (pages, heads, size, d)."""
    padded = nn.functional.pad(kept, (0, 0, 0, len(pages) * size - kept.shape[1]))
    pool[pages] = padded.unflatten(1, (len(pages), size)).transpose(0, 1).to(pool.dtype)


def _known() -> frozenset[type]:
    """The types of modules of which a plain model consists."""
    from sft.models.sambay import Phi4FlashConfig

    config = Phi4FlashConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        return frozenset(type(module) for module in Phi4FlashForCausalLM(config).modules())


_KNOWN = _known()
