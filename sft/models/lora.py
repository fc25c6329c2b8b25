"""LoRA, DoRA and rank-stabilised LoRA adapters from a stage's `train` keys, by peft."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from sft.utils.errors import UsageError, first_line

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

    from sft.recipe.schema import Stage


def lora_settings(stage: Stage) -> dict[str, Any] | None:
    """What makes two stages' adapters the same adapter; None when the stage trains all weights."""
    train = stage.train
    if not train.use_peft:
        return None
    targets = train.lora_target_modules
    return {
        "r": train.lora_r,
        "alpha": train.lora_alpha,
        "dropout": train.lora_dropout,
        "target_modules": sorted(targets) if isinstance(targets, list) else targets,
        "target_parameters": train.lora_target_parameters,
        "modules_to_save": train.lora_modules_to_save,
        "use_rslora": train.use_rslora,
        "use_dora": train.use_dora,
    }


def attach_adapters(model: PreTrainedModel, settings: dict[str, Any], *, seed: int) -> PeftModel:
    """`model` with fresh adapters, drawn from `seed`. All other weights are frozen.

    `settings` are checked already (sft.models.lora_targets). Raises UsageError for what peft doesn't take, with its
    reason.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import set_seed

    set_seed(seed)
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["alpha"],
        lora_dropout=settings["dropout"],
        target_modules=settings["target_modules"] or default_targets(model, dora=settings["use_dora"]),
        target_parameters=settings["target_parameters"],
        modules_to_save=settings["modules_to_save"],
        use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"],
        bias="none",
        task_type="CAUSAL_LM",
    )
    try:
        with warnings.catch_warnings():
            # It sets this by each layer's kind, and tells so where it isn't the default (GPT-2's layers).
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            adapted = get_peft_model(model, config)
    except (ValueError, TypeError) as error:
        raise UsageError(f"train: peft doesn't take these LoRA keys: {first_line(error)}") from error
    if settings["use_dora"] and any(".dt_proj.lora_" in name for name, _ in adapted.named_parameters()):
        raise UsageError(
            "train.lora_target_modules: DoRA can't adapt dt_proj (peft takes its bias off an output that doesn't hold "
            "it yet: the scan adds it); name the other modules, or leave the key out."
        )
    return adapted


def default_targets(model: PreTrainedModel, *, dora: bool = False) -> list[str] | str:
    """Which modules get adapters when the recipe doesn't say: SambaY's projections, else every linear layer."""
    if getattr(model.config, "model_type", None) == "phi4flash":
        from sft.models.load import lora_target_modules

        return [name for name in lora_target_modules(model.config) if not (dora and name == "dt_proj")]
    return "all-linear"
