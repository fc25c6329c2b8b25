"""SambaY: the files that travel with a pushed checkpoint, as they are. Importing them registers `phi4flash`."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_phi4flash import Phi4FlashConfig
from .modeling_phi4flash import Phi4FlashForCausalLM, Phi4FlashModel

AutoConfig.register("phi4flash", Phi4FlashConfig, exist_ok=True)
AutoModel.register(Phi4FlashConfig, Phi4FlashModel, exist_ok=True)
AutoModelForCausalLM.register(Phi4FlashConfig, Phi4FlashForCausalLM, exist_ok=True)

__all__ = ["Phi4FlashConfig", "Phi4FlashForCausalLM", "Phi4FlashModel"]
