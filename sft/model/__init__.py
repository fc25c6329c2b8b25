"""The former name of `sft.models`, kept for code that imports it to register `phi4flash`."""

from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM, Phi4FlashModel

__all__ = ["Phi4FlashConfig", "Phi4FlashForCausalLM", "Phi4FlashModel"]
