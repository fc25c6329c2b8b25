"""From what a recipe says of a model to a model and a tokenizer, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.checkpoint import check_checkpoint, json_object
from sft.models.end_tokens import end_token_ids
from sft.tokenizers.load import refuse_missing_folder
from sft.utils.errors import UserError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.recipe.schema import ModelSection

# Every projection of a SambaY model: Mamba and GMU in/out, scan inputs, attention, MLP. Not the tied embedding.
LORA_TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "Wqkv", "fc1", "fc2")


def lora_target_modules(config: Any) -> list[str] | str:
    """The modules LoRA adapts by default: all projections of a SambaY model, `all-linear` of any other."""
    return list(LORA_TARGETS) if config.model_type == "phi4flash" else "all-linear"


def load_model(section: ModelSection, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> PreTrainedModel:
    """The model a recipe starts from: a checkpoint, or a SambaY built from `config` with random weights.

    Args:
        seed: of the random weights; the same seed gives the same weights.
    Raises:
        UserError: when the checkpoint is missing, cut off or of another shape than its configuration says.
    """
    if section.model_name_or_path is None:
        return _from_scratch(section, tokenizer, seed)
    return load_checkpoint(
        section.model_name_or_path,
        dtype=section.dtype,
        revision=section.model_revision,
        trust_remote_code=section.trust_remote_code,
    )


def load_checkpoint(
    name_or_path: str, *, dtype: str = "bfloat16", revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The causal language model of a folder or Hub id, with every tensor of its configuration filled from the file.

    SambaY checkpoints load with the model of this package, whatever code they carry.
    Raises:
        UserError: when the checkpoint is missing, cut off, or tensors are missing, left over or misshapen.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import sft.models  # noqa: F401  (registers phi4flash)

    refuse_missing_folder(name_or_path, "model", "model.model_name_or_path")
    if Path(name_or_path).is_dir():
        check_checkpoint(name_or_path)
    loaded: Any
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            name_or_path,
            dtype=getattr(torch, dtype),
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model {name_or_path} can't be loaded: {first_line(error)}") from error
    model, loading = loaded
    _check_loading(name_or_path, loading)
    return model


def _from_scratch(section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    import torch

    from sft.models import Phi4FlashConfig, Phi4FlashForCausalLM

    # Rows for every id the tokenizer can give; a multiple of 64 keeps the head's matrix product aligned.
    rows = (len(tokenizer) + 63) // 64 * 64
    options: dict[str, Any] = {
        "vocab_size": rows,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **(section.config or {}),
    }
    try:
        config = Phi4FlashConfig(**options)
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {first_line(error)}") from error
    if config.vocab_size < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size is {config.vocab_size}, but the tokenizer gives ids up to {len(tokenizer) - 1}; "
            "leave vocab_size out or raise it"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model = Phi4FlashForCausalLM._from_config(config, dtype=getattr(torch, section.dtype))
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"model.config: a model of this size can't be made: {first_line(error)}") from error
    model.generation_config.eos_token_id = end_token_ids(tokenizer)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def _check_loading(name: str, loading: dict[str, Any]) -> None:
    for key, meaning in (
        ("missing_keys", "are missing from the checkpoint"),
        ("mismatched_keys", "have another shape than the configuration says"),
        ("unexpected_keys", "are in the checkpoint but not in the model"),
    ):
        keys = sorted(str(k[0]) if isinstance(k, tuple) else str(k) for k in loading.get(key, ()))
        if keys:
            shown = ", ".join(keys[:5]) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
            raise UserError(f"the model {name} can't be loaded: {len(keys)} tensors {meaning}: {shown}")


def read_config(folder: str | Path) -> dict[str, Any]:
    """The configuration of a model folder, as written.

    Raises:
        UserError: when it is missing or broken.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is no model folder: it has no config.json")
    return json_object(path.read_bytes(), path)
