"""vLLM plug-in for SambaY models: registers the configuration and the model; imports neither before they are asked for.

vLLM calls `register` in every process it starts, by the entry point group `vllm.general_plugins`.
"""

from __future__ import annotations

ARCHITECTURE = "Phi4FlashForCausalLM"
OLDEST = (0, 32)


def register() -> None:
    """Make vLLM know SambaY models. May be called again.

    Raises:
        RuntimeError: vLLM is older than 0.32.
    """
    import vllm
    from transformers import AutoConfig

    check_version(vllm.__version__)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from .configuration import Phi4FlashConfig
    from .options import Options

    AutoConfig.register(Phi4FlashConfig.model_type, Phi4FlashConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, "sambay_vllm.model:Phi4FlashForCausalLM")
    MODELS_CONFIG_MAP[ARCHITECTURE] = Options


def check_version(version: str) -> None:
    """Refuse a vLLM older than 0.32 (a build from source without a number, such as "dev", is taken for a newer one).

    Raises:
        RuntimeError: the version is older.
    """
    numbers = version.split("+")[0].split(".")[:2]
    if all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < OLDEST:
        raise RuntimeError(f"sambay-vllm needs vLLM 0.32 or newer, and {version} is installed: upgrade vLLM")
