"""From a stage's `train` keys to SFTConfig, with the tool's own settings; and what can be refused before that."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from sft.recipe.problems import KeyProblem, nearest, refuse
from sft.train.engine import deepspeed_settings, start_engine
from sft.train.precision import expected_precision
from sft.utils.distributed import world_size
from sft.utils.errors import UsageError, first_line

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage
    from sft.recipe.train_keys import TrainSection
    from sft.train.batch import Share


def check_arguments(stage: Stage) -> None:
    """Refuse what this machine or the libraries can't do. Raises UsageError naming the stage and the key."""
    refuse(argument_problems(stage), lambda loc: f"stages[{stage.name}].train.{'.'.join(map(str, loc))}")


def argument_problems(stage: Stage, processes: int | None = None) -> Iterator[KeyProblem]:
    """What this machine or the libraries can't do, by key of the stage's `train` section.

    `processes`: that will train; default: those there are.
    """
    train, cuda = stage.train, _has_cuda()
    if train.activation_offloading and not (cuda and not train.use_cpu):
        yield KeyProblem(("activation_offloading",), "needs a GPU; leave it out", True)
    if reason := _optimizer_problem(train.optim, cuda=cuda and not train.use_cpu):
        yield KeyProblem(("optim",), reason, train.optim)
    if train.tf32 and not (cuda and not train.use_cpu):
        yield KeyProblem(("tf32",), "needs a GPU; leave it out", True)
    if train.deepspeed is not None and not importlib.util.find_spec("deepspeed"):
        yield KeyProblem(("deepspeed",), "needs the package deepspeed; `pip install deepspeed`", train.deepspeed)
    try:
        _engine(train, train.arguments(cuda=cuda, bf16=expected_precision(train).bf16), "", processes)
    except UsageError as error:
        key, reason = _keyed(str(error))
        yield KeyProblem((key,), reason, train.deepspeed)
    yield from _tracker_problems(train)


def _tracker_problems(train: TrainSection) -> Iterator[KeyProblem]:
    """Whom `report_to` names, and who can't be told here."""
    if train.report_to == "none" and train.trackio_space_id is None:  # without importing anything
        return
    from sft.train.trackers import wanted_trackers

    wanted = wanted_trackers(train.report_to)
    if wanted:
        from transformers.integrations import get_available_reporting_integrations, integration_utils

        available = get_available_reporting_integrations()
        for name in wanted:
            if name not in available:
                known = integration_utils.INTEGRATION_TO_CALLBACK
                what = "isn't installed" if name in known else f"is no tracker{nearest(name, known)}"
                reason = f"{name!r} {what}; here are {', '.join([*available, 'none'])}"
                yield KeyProblem(("report_to",), reason, name)
    if train.trackio_space_id is not None and "trackio" not in wanted:
        yield KeyProblem(("trackio_space_id",), "has no effect without `report_to: trackio`", train.trackio_space_id)
    elif train.trackio_space_id is not None:
        from huggingface_hub import get_token

        if get_token() is None:
            reason = "is on the Hub, and nobody is logged in: `hf auth login`, or set HF_TOKEN"
            yield KeyProblem(("trackio_space_id",), reason, train.trackio_space_id)


def _optimizer_problem(name: str, *, cuda: bool) -> str | None:
    """Why an optimizer can't be had on this machine; None where it can."""
    if name == "muon":
        from sft.train.muon import muon_problem

        return muon_problem()
    if not any(part in name for part in ("8bit", "paged", "lion")):
        return None
    if not cuda:
        return f"{name} is bitsandbytes', whose optimizers need an NVIDIA GPU: use adamw_torch_fused here"
    if not importlib.util.find_spec("bitsandbytes"):
        return f"{name} needs bitsandbytes; `pip install bitsandbytes` or use another"
    return None


def _keyed(sentence: str) -> tuple[str, str]:
    """`.use_cpu: why` as key and reason; what names no key is about the engine."""
    key, _, reason = sentence.partition(": ")
    return (key[1:], reason) if key.startswith(".") else ("deepspeed", sentence.removeprefix(": "))


def build_arguments(stage: Stage, paths: RunPaths, *, bf16: bool, share: Share | None = None) -> SFTConfig:
    """SFTConfig of a stage: all its keys, defaults too, and what a recipe can't change; `bf16`: see `Precision`;
    `share`: what each process does of a step, where that isn't what the recipe asks for.

    To be called inside `fresh_engine`: the libraries start the engine while they read its settings.
    Raises UsageError naming the stage when a value doesn't fit.
    """
    cuda = _has_cuda()
    if not cuda:
        # Without this DeepSpeed, which transformers imports, warns on standard output that it found no accelerator.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # FlashAttention sums a gradient's parts in any order unless asked, and transformers asks for other models only so.
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")
    from trl import SFTConfig

    where = f"stages[{stage.name}].train"
    values = stage.train.arguments(cuda=cuda, bf16=bf16)
    values.update(_own_settings(stage, paths, values))
    if share is not None:
        values.update(per_device_train_batch_size=share.rows, gradient_accumulation_steps=share.micro_batches)
    values.update(_engine(stage.train, values, where))
    start_engine(values["deepspeed"], on_gpu=not values["use_cpu"])
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


def _engine(train: TrainSection, values: dict[str, Any], where: str, processes: int | None = None) -> dict[str, Any]:
    """bf16 and deepspeed as transformers is to be told of them."""
    together, world = train.sequence_parallel_size, processes or world_size()
    if world % together:
        raise UsageError(
            f"{where}.sequence_parallel_size: {together} processes share a row, and the run has {world}: start a "
            f"multiple of {together} (--num_processes, torchrun --nproc_per_node), or lower it."
        )
    bf16 = bool(values["bf16"])
    settings = deepspeed_settings(values["deepspeed"], bf16=bf16, where=where)
    if settings is None:
        return {"bf16": bf16, "deepspeed": None}
    if train.optim == "muon":
        raise UsageError(
            f"{where}.optim: muon makes whole matrices orthogonal, and DeepSpeed hands an optimizer pieces of them: "
            "leave deepspeed out (several processes run as DDP), or use adamw_torch_fused."
        )
    if settings["zero_optimization"].get("stage") == 3 and train.use_peft and values["gradient_checkpointing"]:
        raise UsageError(
            f"{where}: LoRA with ZeRO-3 and gradient checkpointing needs reentrant checkpointing, which loses "
            "gradients; use zero2, or gradient_checkpointing: false."
        )
    if settings["zero_optimization"].get("stage") == 3 and train.ema is not None:
        raise UsageError(
            f"{where}.ema: can't be kept under ZeRO-3, whose processes hold a part of each weight: use zero2, or "
            "average checkpoints (average.last)."
        )
    if train.use_cpu and _has_cuda():
        raise UsageError(f"{where}.use_cpu: DeepSpeed takes a GPU that it sees; set CUDA_VISIBLE_DEVICES= to hide it.")
    # bf16 is part of DeepSpeed's settings now; the key would have it switch on its own.
    return {"bf16": False, "deepspeed": settings}


def _own_settings(stage: Stage, paths: RunPaths, values: dict[str, Any]) -> dict[str, Any]:
    """What a recipe can't change, because the tool's promises rest on it."""
    from sft.train.trackers import TRACKERS, wanted_trackers

    own: dict[str, Any] = {
        "output_dir": str(paths.stage_dir(stage.name)),
        "packing": False,
        "padding_free": False,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "remove_unused_columns": False,
        "disable_tqdm": True,
        "average_tokens_across_devices": True,
        # After the first backward pass DDP puts gradients in the order they came in, which shares change, and sums of
        # more than two follow from places: a resumed stage would come to other bits. This keeps the first order.
        "ddp_find_unused_parameters": stage.train.sequence_parallel_size > 1,
        # A loss that isn't a number stops the run; transformers would log an average in its place.
        "logging_nan_inf_filter": False,
        # Those of TRACKERS are told by sft.train.trackers.
        "report_to": [name for name in wanted_trackers(values["report_to"]) if name not in TRACKERS] or ["none"],
    }
    if values["gradient_checkpointing"]:
        # What is kept of a layer, and where, is set up by sft.train.recompute.
        own |= {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "activation_offloading": False}
    return own


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()
