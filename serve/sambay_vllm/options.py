"""What vLLM may be asked to do with a SambaY model: options that don't work are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig

from .refused import unsupported


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
