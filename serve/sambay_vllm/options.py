"""What vLLM may be asked to do with a SambaY model: options that don't work are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig


class Options(VerifyAndUpdateConfig):
    """vLLM calls it with the whole configuration of an engine, before workers start."""

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Refuse what isn't supported; keep the scan's states in float32 where no type is asked for, and run eagerly.

        Raises:
            ValueError: one sentence, with the option's name.
        """
        problem = unsupported(vllm_config)
        if problem:
            raise ValueError(f"sambay-vllm: {problem}")
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"
        # The layers are written out step by step, and nothing in them has been recorded as a graph yet.
        vllm_config.model_config.enforce_eager = True


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
    if cache.enable_prefix_caching and cache.mamba_cache_mode == "all":
        return "mamba_cache_mode=all is not supported: prefix caching works with align, which is the default"
    return None
