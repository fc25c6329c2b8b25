"""QLoRA (arXiv 2305.14314): the frozen weights of a base model in 4 bits, by bitsandbytes on a CUDA device.

Only training holds them so. What is evaluated and exported is the adapter on the weights as their file has them.
"""

from __future__ import annotations

import importlib.util
from typing import Any

KEPT_WHOLE = {"phi4flash": ["dt_proj", "lm_head"]}
"""Model type -> linear layers whose weight the model itself reads. Of others transformers leaves the head alone."""


def four_bit_problem() -> str | None:
    """Why this machine can't hold weights in 4 bits; None where it can."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA GPU, and none is visible here; leave it out to train adapters on the weights as they are"
    if importlib.util.find_spec("bitsandbytes") is None:
        return "needs the package bitsandbytes; `pip install 'sambay-sft[cuda]'`"
    return None


def loading_options(model_type: str, compute: str) -> dict[str, Any]:
    """What `from_pretrained` is told: NF4 with quantised constants, on this process's GPU, computing in `compute`."""
    import torch
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, compute),
        llm_int8_skip_modules=KEPT_WHOLE.get(model_type),
    )
    return {"quantization_config": config, "device_map": {"": torch.cuda.current_device()}}


def ready_for_adapters(model: Any) -> Any:
    """The model, frozen, with what isn't in 4 bits (norms, embeddings, head) in float32."""
    from peft import prepare_model_for_kbit_training

    # The trainer turns activation checkpointing on, as for any other model.
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def is_four_bit(model: Any) -> bool:
    """Whether a model, or the one that a PeftModel stands on, holds weights in 4 bits."""
    return bool(getattr(model, "is_loaded_in_4bit", False))
