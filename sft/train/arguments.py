"""From a stage's `train` keys to SFTConfig: the tool's own settings, and defaults that fit the machine."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING, Any

from sft.train.engine import deepspeed_settings, launcher_precision, start_alone
from sft.utils.distributed import world_size
from sft.utils.errors import UsageError, first_line

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage

# Packing happened when the data was prepared; these keys must not reach TRL, which would do it again.
_PREPARED = ("packing", "packing_strategy", "max_length", "dataset_num_proc")

# Keys that change nothing of what is trained: a stage that is done or under way may be run again with other values.
NEUTRAL = frozenset(
    {"logging_steps", "logging_first_step", "report_to", "run_name", "disable_tqdm", "save_strategy", "save_steps"}
    | {"save_total_limit", "dataset_num_proc", "dataloader_num_workers", "dataloader_pin_memory", "ddp_timeout"}
    | {"dataloader_persistent_workers", "dataloader_prefetch_factor", "log_level"}
)


def build_arguments(stage: Stage, paths: RunPaths) -> SFTConfig:
    """SFTConfig of a stage. What the recipe doesn't set gets these values in place of TRL's:

    * bf16 and gradient_checkpointing: on with CUDA, off on a CPU, where they only cost time;
    * logging_steps 1 (metrics.jsonl has every step), save_steps 100, save_total_limit 2;
    * disable_tqdm, pin_memory off on a CPU, ddp_find_unused_parameters off (the audit refuses unused ones).

    To be called inside `fresh_engine`: the libraries start the engine while they read its settings.
    Raises UsageError naming the stage when a value doesn't fit.
    """
    import torch

    if not torch.cuda.is_available():
        # Without this DeepSpeed, which transformers imports, warns on standard output that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from trl import SFTConfig

    set_by_recipe = {key: value for key, value in stage.train.arguments().items() if key not in _PREPARED}
    where = f"stages[{stage.name}].train"
    cuda = torch.cuda.is_available() and not set_by_recipe.get("use_cpu", False)
    if set_by_recipe.get("activation_offloading") and not cuda:
        raise UsageError(f"{where}.activation_offloading: needs a GPU; leave it out.")
    values = {**_defaults(cuda), **{key: value for key, value in set_by_recipe.items() if value is not None}}
    values.update(_own_settings(stage, paths, values))
    values.update(_precision_and_engine(set_by_recipe, values, where))
    try:
        with warnings.catch_warnings():
            # transformers is renaming gradient_checkpointing; TRL still reads the old name.
            warnings.simplefilter("ignore", FutureWarning)
            args = SFTConfig(**values)
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(f"{where}: {first_line(error)}") from error
    if args.world_size != world_size():
        raise UsageError(
            f"{args.world_size} processes were started in a way that isn't known here (WORLD_SIZE is {world_size()}): "
            "start them with torchrun or accelerate launch."
        )
    # One process uses one GPU: with several, transformers would split every batch over them by rows (DataParallel).
    args._n_gpu = min(args.n_gpu, 1)
    return args


def _precision_and_engine(set_by_recipe: dict[str, Any], values: dict[str, Any], where: str) -> dict[str, Any]:
    """bf16, fp16 and deepspeed, where the recipe's word counts before the launcher's, and that before the default."""
    precision = {key: bool(values.get(key)) for key in ("bf16", "fp16")}
    launched = launcher_precision()
    if launched and set_by_recipe.get("bf16") is None and not precision["fp16"]:
        precision = {key: key == launched for key in precision}
    settings = deepspeed_settings(values.get("deepspeed"), bf16=precision["bf16"], where=where)
    if settings is None:
        return precision
    if precision["fp16"]:
        raise UsageError(f"{where}.fp16: isn't supported under DeepSpeed; set bf16.")
    if "LOCAL_RANK" not in os.environ:
        start_alone()
    # bf16 is part of DeepSpeed's settings now; the key would have it switch on its own.
    return {"bf16": False, "fp16": False, "deepspeed": settings}


def _defaults(cuda: bool) -> dict[str, Any]:
    return {
        "bf16": cuda,
        "gradient_checkpointing": cuda,
        "logging_steps": 1,
        "save_steps": 100,
        "save_total_limit": 2,
        "report_to": "none",
        "dataloader_pin_memory": cuda,
        "ddp_find_unused_parameters": False,
        "log_level": "warning",
        "use_cpu": not cuda,
    }


def _own_settings(stage: Stage, paths: RunPaths, values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe can't change, because the tool's promises rest on it."""
    own: dict[str, Any] = {
        "output_dir": str(paths.stage_dir(stage.name)),
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
        # A loss that isn't a number stops the run; transformers would log an average in its place.
        "logging_nan_inf_filter": False,
        "report_to": _trackers(values["report_to"]),
        "use_cpu": values["use_cpu"] or not _has_cuda(),
        "data_seed": values["seed"] if values.get("data_seed") is None else values["data_seed"],
    }
    if values["gradient_checkpointing"]:
        kwargs = dict(values.get("gradient_checkpointing_kwargs") or {})
        own["gradient_checkpointing_kwargs"] = {**kwargs, "use_reentrant": False}
    return own


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _trackers(report_to: str | list[str]) -> list[str]:
    """The trackers besides TensorBoard, which is always written, by a callback of ours."""
    names = [report_to] if isinstance(report_to, str) else report_to
    return [name for name in names if name not in ("none", "tensorboard")] or ["none"]
