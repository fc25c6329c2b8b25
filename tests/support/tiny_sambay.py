"""A SambaY small enough to test: eight layers, every kind of layer among them, random weights of ordinary size."""

from __future__ import annotations

import torch

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM


def tiny_config(**changes) -> Phi4FlashConfig:
    options = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "sliding_window": 24,
        "mamba_d_state": 8,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return Phi4FlashConfig(**{**options, **changes})


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Phi4FlashForCausalLM:
    """Weights larger than at initialisation, biases and norms off their neutral values: nothing hides behind a zero."""
    torch.manual_seed(seed)
    model = Phi4FlashForCausalLM(tiny_config(**changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("A_log", "dt_proj.bias")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
            elif parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    return model.to(dtype).eval()
