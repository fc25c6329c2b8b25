"""From what a recipe says of a model to a model and a tokenizer, or one sentence that says why not."""

from __future__ import annotations

import gc
import os
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.checkpoint import check_checkpoint, json_object
from sft.models.end_tokens import end_token_ids
from sft.models.four_bit import loading_options, ready_for_adapters
from sft.recipe.problems import nearest
from sft.tokenizers.load import refuse_missing
from sft.utils.errors import UserError, first_line
from sft.utils.hub_ask import hub_or_cache
from sft.utils.hub_cache import remedy
from sft.utils.quiet import no_library_bars
from sft.utils.say import say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from sft.recipe.schema import ModelSection

# Every projection of a SambaY model: Mamba and GMU in/out, scan inputs, attention, MLP. Not the tied embedding.
LORA_TARGETS = ("in_proj", "x_proj", "dt_proj", "out_proj", "Wqkv", "fc1", "fc2")

CPU_FLOAT32 = 8_000_000_000
"""Bytes up to which weights are held in float32 on a CPU, whose bfloat16 is slow and rounds for nothing."""


def lora_target_modules(config: Any) -> list[str] | str:
    """The modules LoRA adapts by default: all projections of a SambaY model, `all-linear` of any other."""
    return list(LORA_TARGETS) if config.model_type == "phi4flash" else "all-linear"


def load_model(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, four_bit: str | None = None
) -> PreTrainedModel:
    """The model a recipe starts from: a checkpoint, or a SambaY built from `config` with random weights.

    Args:
        seed: of the random weights; the same seed gives the same weights.
        four_bit: see `load_checkpoint`.
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
        four_bit=four_bit,
    )


@no_library_bars()
def load_checkpoint(
    name_or_path: str,
    *,
    dtype: str = "bfloat16",
    revision: str | None = None,
    trust_remote_code: bool = False,
    four_bit: str | None = None,
) -> PreTrainedModel:
    """The causal language model of a folder or Hub id, with every tensor of its configuration filled from the file.

    SambaY checkpoints load with the model of this package, whatever code they carry.
    Args:
        dtype: a torch type's name; or "auto": what its configuration says; or "held": what its tensors are stored in,
            where they are of one type, else float32. What is loaded as it is stored stays mapped and takes no memory.
        four_bit: hold the linear layers' weights in 4 bits, to put adapters on, and compute in this type. Needs CUDA.
    Raises:
        UserError: when the checkpoint is missing, cut off, or tensors are missing, left over or misshapen.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import sft.models  # noqa: F401  (registers phi4flash)
    from sft.models.widen import HELD, stored_dtype

    refuse_missing(name_or_path, "model", "model.model_name_or_path", revision)
    if Path(name_or_path).is_dir():
        check_checkpoint(name_or_path)
    if dtype == HELD:
        dtype = stored_dtype(name_or_path, revision)
    gc.collect()  # a model that was let go of may hang in a circle: two of them may not fit
    loaded: Any
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        with hub_or_cache(name_or_path, revision):
            if four_bit is not None:
                model_type = AutoConfig.from_pretrained(name_or_path, **options).model_type
                options |= loading_options(model_type, four_bit)
            loaded = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                dtype=dtype if dtype == "auto" else getattr(torch, dtype),
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"the model {name_or_path} can't be loaded: {first_line(error)}{remedy(error)}") from error
    model, loading = loaded
    _check_loading(name_or_path, loading)
    return model if four_bit is None else ready_for_adapters(model)


@cache
def machine_dtype(
    name_or_path: str | None, dtype: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> str:
    """What a model's weights are held in: `dtype`; on a CPU float32, where they take at most CPU_FLOAT32 bytes so.

    It follows from the model and the kind of machine, never from the memory that is free: a resumed run has to come to
    the same again. Where float32 is too large that is told on standard error, once.

    Args:
        name_or_path: a folder or Hub id; None: a model made here, which is in float32 on a CPU.
    Raises:
        UserError: when there is no such model.
    """
    import torch

    if torch.cuda.is_available() or dtype == "float32":
        return dtype
    if name_or_path is None:
        return "float32"
    size = 4 * parameter_count(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if size <= CPU_FLOAT32:
        return "float32"
    say(f"{name_or_path} is held in {dtype} on this CPU: float32 would take {size / 1e9:.1f} GB")
    return dtype


def configured_dtype(name_or_path: str, *, trust_remote_code: bool = False) -> str:
    """The type of weights that the configuration of a folder or Hub id names; "float32" where it names none.

    Raises:
        UserError: when there is no such model.
    """
    config = structure(name_or_path, trust_remote_code=trust_remote_code).config
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def parameter_count(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> int:
    """How many parameters the model of a folder or Hub id has, tied ones once; no weights are read."""
    model = structure(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def structure(
    name_or_path: str | None,
    config: dict[str, Any] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    fetch: bool = True,
) -> PreTrainedModel:
    """The modules and parameters of a folder's or Hub id's model, or of one from `config`, on torch's meta device.
    Without `fetch` the Hub isn't asked.

    Raises:
        UserError: when the configuration is missing or no model can be built from it.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from sft.models import Phi4FlashConfig

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if name_or_path is not None and fetch:
        refuse_missing(name_or_path, "model", "model.model_name_or_path", revision)
    try:
        if name_or_path is None:
            found: Any = Phi4FlashConfig(**(config or {}))
        else:
            with hub_or_cache(name_or_path, revision) if fetch else nullcontext():
                found = AutoConfig.from_pretrained(
                    name_or_path, revision=revision, local_files_only=not fetch, **options
                )
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(found, **options)
    except Exception as error:
        raise UserError(f"the model {name_or_path or 'of model.config'} can't be built: {first_line(error)}") from error


def scratch_config(section: ModelSection, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The configuration of a SambaY that is built from what a recipe says under `model.config`.

    Raises:
        UserError: for a key or a value that no model has, and a vocabulary smaller than the tokenizer's.
    """
    from sft.models import Phi4FlashConfig

    # Rows for every id the tokenizer can give; a multiple of 64 keeps the head's matrix product aligned.
    options: dict[str, Any] = {
        "vocab_size": (len(tokenizer) + 63) // 64 * 64,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    known, given = set(Phi4FlashConfig().to_dict()), section.config or {}
    for key in given:
        if key not in known:
            raise UserError(f"model.config: {key!r} is no key of a model's configuration{nearest(key, known)}")
    vocabulary = given.get("vocab_size")
    if isinstance(vocabulary, int) and vocabulary < len(tokenizer):
        raise UserError(
            f"model.config.vocab_size is {vocabulary}, but the tokenizer gives ids up to {len(tokenizer) - 1}; "
            "leave vocab_size out or raise it"
        )
    try:
        return Phi4FlashConfig(**{**options, **given})
    except (ValueError, TypeError) as error:
        raise UserError(f"model.config: {first_line(error)}") from error


def _from_scratch(section: ModelSection, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    import torch

    from sft.models import Phi4FlashForCausalLM

    config = scratch_config(section, tokenizer)
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


def on_device(model: Any) -> Any:
    """`model` in eval mode on the GPU where there is one: of several processes each takes one of its machine's."""
    import torch

    if not torch.cuda.is_available():
        return model.eval()
    if (local := os.environ.get("LOCAL_RANK")) is not None:
        torch.cuda.set_device(int(local) % torch.cuda.device_count())
    return model.to("cuda").eval()
