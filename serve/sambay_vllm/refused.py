"""Options of vLLM that a SambaY model can't be run with. Needs nothing: no torch, no vLLM."""

from __future__ import annotations

from typing import Any


def unsupported(vllm_config: Any) -> str | None:
    """One sentence on the first option that a SambaY model can't be run with; None: all are fine."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = getattr(parallel, name)
        if size != 1:
            return f"{name}={size} is not supported: a SambaY model runs whole on one device, so leave it at 1"
    if vllm_config.speculative_config is not None:
        return "speculative decoding is not supported: a recurrent state can't be taken back"
    if vllm_config.quant_config is not None:
        return "quantization is not supported: weights are bfloat16 or float32 (--dtype)"
    if vllm_config.lora_config is not None:
        return "LoRA adapters (enable_lora) are not supported: export the model merged (`sft export` does so by itself)"
    if cache.cache_dtype.startswith("fp8"):
        return f"kv_cache_dtype={cache.cache_dtype} is not supported: leave it at auto"
    return None
