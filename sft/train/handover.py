"""What a stage hands on: full weights, or an adapter beside the name of its base, in `stages/<name>/final`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.base import BASE, base_folder
from sft.utils.errors import UserError
from sft.utils.files import atomic_folder, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.models.average import Average
    from sft.recipe.paths import RunPaths


def save_final(
    folder: Path,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base: dict[str, Any] | None = None,
    weights: dict[str, Any] | None = None,
    average: Average | None = None,
) -> None:
    """Write the trained weights (or the adapter and the name of its base) and the tokenizer to `folder`, atomically.

    `weights`: the state dict to write, where the model itself holds only a part of it (DeepSpeed). `average`: what
    takes the place of the written weights' values.
    """
    from sft.models.average import average_into
    from sft.models.save import save_model

    with atomic_folder(folder) as path:
        if hasattr(model, "peft_config"):
            model.save_pretrained(path, state_dict=weights)
        else:
            save_model(path, model, weights=weights)
        tokenizer.save_pretrained(path)
        if base is not None:
            write_json(path / BASE, base)
        if average is not None:
            average_into(path, average)
        (path / "README.md").unlink(missing_ok=True)


def load_stage_model(
    paths: RunPaths, stage: str | None = None, *, dtype: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer after `stage`, or those the run starts from (None).

    A LoRA stage gives a PeftModel on its base. `dtype` ("float32", "bfloat16"): what the weights are held in; default:
    see `default_dtype`. Adapters are always held in float32.
    Raises UserError when the stage isn't done or its files are gone.
    """
    final = None if stage is None else paths.final_dir(stage)
    if stage is not None and final is not None and not (paths.stage_manifest(stage).exists() and final.exists()):
        raise UserError(
            f"Stage {stage} isn't done (no {paths.stage_manifest(stage)}): run `sft train --stage {stage}` first."
        )
    return load_answering(paths, final, dtype or default_dtype(paths))


def load_answering(paths: RunPaths, final: Path | None, dtype: str) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer of a `final/` folder (None: of the run's start), held in `dtype` while they answer.

    An adapter's base is that which it was trained on, held as it was and then in `dtype`.
    """
    from sft.models.answering import hold_in

    if final is None:
        model, tokenizer = load_start(paths, dtype=dtype)
    else:
        is_adapter = (final / "adapter_config.json").exists()
        model, tokenizer = load_final(paths, final, dtype=default_dtype(paths) if is_adapter else dtype)
    return hold_in(model, dtype), tokenizer


def load_final(
    paths: RunPaths, final: Path, *, dtype: str, trainable: bool = False, four_bit: str | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that a `final/` folder holds. `four_bit`: of an adapter's base, see `load_checkpoint`."""
    from sft.tokenizers.load import load_tokenizer

    tokenizer = load_tokenizer(str(final))
    if not (final / "adapter_config.json").exists():
        return load_weights(paths, final, dtype), tokenizer
    return _with_adapter(paths, final, dtype, trainable, four_bit), tokenizer


def _with_adapter(paths: RunPaths, final: Path, dtype: str, trainable: bool, four_bit: str | None) -> Any:
    from peft import PeftModel

    folder = base_folder(paths, final)
    if folder is None:
        model = load_start(paths, dtype=dtype, four_bit=four_bit)[0]
    else:
        model = load_weights(paths, folder, dtype, four_bit)
    return PeftModel.from_pretrained(model, str(final), is_trainable=trainable)


def load_start(paths: RunPaths, *, dtype: str, four_bit: str | None = None) -> tuple[Any, PreTrainedTokenizerBase]:
    """The model and tokenizer that the run starts from. A model from scratch is held in float32 whatever `dtype` says:
    its random weights are drawn in that type."""
    from sft.models.load import load_model
    from sft.tokenizers.load import start_tokenizer

    section = paths.recipe.model
    tokenizer = start_tokenizer(section)
    dtype = "float32" if section.config is not None else dtype
    section = section.model_copy(update={"dtype": dtype})
    model = load_model(section, tokenizer, seed=paths.recipe.seed, four_bit=four_bit)
    return model, tokenizer


def load_weights(paths: RunPaths, folder: Path, dtype: str, four_bit: str | None = None) -> PreTrainedModel:
    """The model in a folder of the run, loaded as the run's recipe says."""
    from sft.models.load import load_checkpoint

    trust = paths.recipe.model.trust_remote_code
    return load_checkpoint(str(folder), dtype=dtype, trust_remote_code=trust, four_bit=four_bit)


def default_dtype(paths: RunPaths) -> str:
    """What the run's weights are held in on this machine: see `machine_dtype`."""
    from sft.models.load import machine_dtype
    from sft.tokenizers.load import check_named

    section = paths.recipe.model
    if section.model_name_or_path is not None:
        # At once, where transformers would try again and again.
        check_named(section.model_name_or_path, "model", section.model_revision)
    options: dict[str, Any] = {"revision": section.model_revision, "trust_remote_code": section.trust_remote_code}
    return machine_dtype(section.model_name_or_path, section.dtype, **options)
