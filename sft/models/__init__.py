"""The models. Importing this package teaches transformers' Auto classes the model type `phi4flash`."""

from sft.models.sambay import Phi4FlashConfig, Phi4FlashForCausalLM, Phi4FlashModel

__all__ = ["Phi4FlashConfig", "Phi4FlashForCausalLM", "Phi4FlashModel"]
