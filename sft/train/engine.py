"""What a stage runs on: one process, DDP or DeepSpeed; float32 masters on each; begun and ended with the stage.

Accelerate, transformers and DeepSpeed keep the engine for the whole process (in singletons, environment variables, a
replaced `torch.nn.functional.linear`). Left alone, a stage's ZeRO-2 becomes the next one's, and a model loaded for an
evaluation on rank 0 waits under ZeRO-3 for ranks that never come.
"""

from __future__ import annotations

import copy
import gc
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from sft.utils.distributed import is_main, rank, store_of_group, world_size
from sft.utils.errors import UsageError, UserError
from sft.utils.files import read_json

if TYPE_CHECKING:
    from torch import Tensor
    from trl import SFTConfig

    from sft.train.trainer import SambayTrainer

OWN_KEYS = {
    "optimizer": "the stage's train keys set it, and keep weight decay off A_log, D, the lambdas and norms",
    "scheduler": "the stage's train keys set it",
    "amp": "the stage's train keys set bf16",
}
"""Sections of a DeepSpeed file that would undo what a stage's own keys say."""

OTHER_ENGINES = ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG")
"""What `accelerate launch` can ask for and this tool doesn't run: ACCELERATE_USE_<name>."""


@contextmanager
def fresh_engine() -> Iterator[None]:
    """A stretch of the program that begins without an engine and leaves none behind, nor a changed environment."""
    import torch

    environment, linear = dict(os.environ), torch.nn.functional.linear
    alone = not torch.distributed.is_initialized()
    _forget()
    try:
        with _torch_switches():
            yield
    finally:
        _forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        torch.nn.functional.linear = linear
        if alone and "LOCAL_RANK" not in environment and torch.distributed.is_initialized():
            _end_group()
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)


@contextmanager
def _torch_switches() -> Iterator[None]:
    """Put back, at the end, what a stage's `full_determinism` and `tf32` switch for the whole process."""
    put_back = _switched_as_now()
    _outside.append(put_back)
    try:
        yield
    finally:
        _outside.pop()
        put_back()


_outside: list[Callable[[], None]] = []
"""What puts the switches back to how they were before the stages that are under way."""


@contextmanager
def switched_as_outside() -> Iterator[None]:
    """Inside, these switches and `torch.nn.functional.linear` are what they are where nothing is trained, and a model
    that is loaded is a whole one on each process."""
    import torch

    put_back, linear = _switched_as_now(), torch.nn.functional.linear
    config = vars(sys.modules.get("transformers.integrations.deepspeed", object)).get("_hf_deepspeed_config_weak_ref")
    for switch in _outside[:1]:
        switch()
    torch.nn.functional.linear = torch._C._nn.linear  # ZeRO-3 has its own in its place
    if config is not None:
        sys.modules["transformers.integrations.deepspeed"].unset_hf_deepspeed_config()  # or it would part the weights
    try:
        yield
    finally:
        if config is not None:
            vars(sys.modules["transformers.integrations.deepspeed"])["_hf_deepspeed_config_weak_ref"] = config
        torch.nn.functional.linear = linear
        put_back()


def _switched_as_now() -> Callable[[], None]:
    """What switches the whole process as it is now."""
    import torch

    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    held = {(torch.backends.cudnn, key): getattr(torch.backends.cudnn, key) for key in ("deterministic", "benchmark")}
    if hasattr(torch.backends, "fp32_precision"):
        held[torch.backends, "fp32_precision"] = torch.backends.fp32_precision

    def put_back() -> None:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        for (owner, key), value in held.items():
            setattr(owner, key, value)

    return put_back


def _forget() -> None:
    """Empty the places where the libraries keep an engine, as far as they are loaded."""
    if accelerate := sys.modules.get("accelerate.state"):
        accelerate.AcceleratorState._reset_state(reset_partial_state=True)
        accelerate.GradientState._reset_state()
    if transformers := sys.modules.get("transformers.integrations.deepspeed"):
        transformers.unset_hf_deepspeed_config()
    if autocast := sys.modules.get("deepspeed.runtime.torch_autocast"):
        vars(autocast).update(TORCH_AUTOCAST_INITIALIZED=False, TORCH_AUTOCAST_DTYPE=None)


COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""That of transformers, too: torch gives NCCL ten minutes."""


def start_engine(settings: dict[str, Any] | None, *, on_gpu: bool) -> None:
    """What has to be so before the libraries start the engine of `settings` (deepspeed_settings), inside fresh_engine.

    The process group is begun here: theirs would find the addresses of a group before it (`store_of_group`). Without a
    launcher DeepSpeed would look for MPI: it gets a process group of this one process.
    """
    import torch

    for name in LAUNCHED:
        os.environ.pop(name, None)
    if world_size() > 1 and not torch.distributed.is_initialized():
        backend = "nccl" if on_gpu else "gloo"
        torch.distributed.init_process_group(
            backend, store=store_of_group(), rank=rank(), world_size=world_size(), timeout=COLLECTIVE_TIMEOUT
        )
    if settings is None:
        return
    if not torch.cuda.is_available():
        # DeepSpeed would compile its own all-reduce, which takes a minute and hangs for ever where a build was killed.
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    if "LOCAL_RANK" not in os.environ:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)


def _end_group() -> None:
    import torch

    torch.distributed.destroy_process_group()
    if comm := sys.modules.get("deepspeed.comm.comm"):
        vars(comm)["cdb"] = None
    if groups := sys.modules.get("deepspeed.utils.groups"):
        # A module of nothing but global groups, all of them part of the one that has ended.
        importlib.reload(groups)


# ---- what is asked for ----


LAUNCHED = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_MIXED_PRECISION")
"""How `accelerate launch` hands its choice on. A stage's settings say it all: the libraries needn't read these."""


def launched_precision() -> str | None:
    """bf16 where `accelerate launch` was told so, else None. Raises UsageError for what isn't run here."""
    for name in OTHER_ENGINES:
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            raise UsageError(
                f"accelerate's configuration asks for {name}, which isn't run here: use zero1, zero2 or zero3."
            )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision not in ("no", "bf16"):
        raise UsageError(
            f"accelerate's configuration asks for {precision}, which isn't trained in here: use bf16 or no."
        )
    return precision if precision == "bf16" else None


def deepspeed_settings(asked: str | dict[str, Any] | None, *, bf16: bool, where: str) -> dict[str, Any] | None:
    """DeepSpeed's settings for a stage: `asked` (a file or its content), else the launcher's, else None.

    Weights are held and summed in float32, and bf16 computes under torch's autocast, as it does without DeepSpeed.
    DeepSpeed's own bf16 would round A_log, D, lambdas and norms to 8 bits, sum gradients in them, and hand them on.
    Raises UsageError naming `where` for settings that contradict the stage's train keys.
    """
    settings = _launched_settings() if asked is None else _content(asked, where)
    if settings is None:
        return None
    for key, reason in OWN_KEYS.items():
        if key in settings:
            raise UsageError(f"{where}.deepspeed: `{key}` has no place there: {reason}.")
    if (settings.pop("fp16", None) or {}).get("enabled") is True:
        raise UsageError(f"{where}.deepspeed: fp16 isn't supported; set bf16.")
    if (own := (settings.pop("bf16", None) or {}).get("enabled", "auto")) not in ("auto", bf16):
        raise UsageError(f"{where}.deepspeed: bf16.enabled is {own}, but the stage's bf16 is {bf16}: make them agree.")
    settings["torch_autocast"] = {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    settings["data_types"] = {**settings.get("data_types", {}), "grad_accum_dtype": "fp32"}
    zero = settings.setdefault("zero_optimization", {})
    if not isinstance(zero, dict) or zero.get("stage", 0) not in (0, 1, 2, 3):
        raise UsageError(f"{where}.deepspeed: zero_optimization.stage must be 0, 1, 2 or 3.")
    # Whole weights are handed on: a setting of `false` would be noticed after the last step.
    zero["stage3_gather_16bit_weights_on_model_save"] = True
    return settings


def _content(asked: str | dict[str, Any], where: str) -> dict[str, Any]:
    if isinstance(asked, dict):
        return copy.deepcopy(asked)
    try:
        content = read_json(asked)
    except (OSError, ValueError) as error:
        raise UsageError(f"{where}.deepspeed: {asked} can't be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{where}.deepspeed: {asked} holds no JSON object.")
    return content


def _launched_settings() -> dict[str, Any] | None:
    """What `accelerate launch` with a DeepSpeed configuration asks for."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() != "true":
        return None
    from accelerate.utils import DeepSpeedPlugin

    settings = dict(DeepSpeedPlugin().deepspeed_config)
    if os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none") == "none":
        # accelerate's defaults, where nothing was said: the stage's keys say it.
        settings |= {"gradient_accumulation_steps": "auto", "gradient_clipping": "auto"}
    settings.pop("steps_per_print", None)
    return settings


def autocast_dtype(args: SFTConfig) -> Any:
    """The torch dtype that a stage computes in under autocast, on whatever engine; None: in its weights' own."""
    import torch

    if isinstance(args.deepspeed, dict):
        return torch.bfloat16 if args.deepspeed["torch_autocast"]["enabled"] else None
    return torch.bfloat16 if args.bf16 else None


def asked_engine(args: SFTConfig, sequence_parallel_size: int = 1) -> dict[str, Any]:
    """The engine that a stage's settings ask for: `engine` (a class's name, None for the model itself), `zero_stage`,
    `world_size`, of which `sequence_parallel_size` share a row, and `precision`."""
    launched = "LOCAL_RANK" in os.environ
    zero_stage = None
    if isinstance(args.deepspeed, dict):
        zero_stage = args.deepspeed["zero_optimization"].get("stage", 0)
    name = "DeepSpeedEngine" if zero_stage is not None else "DistributedDataParallel" if launched else None
    return {
        "engine": name,
        "zero_stage": zero_stage,
        "world_size": world_size(),
        "sequence_parallel_size": sequence_parallel_size,
        "precision": str(autocast_dtype(args) or "float32").removeprefix("torch."),
    }


# ---- what runs ----


def running_engine(trainer: SambayTrainer) -> dict[str, Any]:
    """The same of a trainer that has begun to train, asked of the objects that do it."""
    wrapped: Any = getattr(trainer.model_wrapped, "_orig_mod", trainer.model_wrapped)
    name: str | None = type(wrapped).__name__
    if wrapped is trainer.model:
        name = None
    zero_stage, precision = None, trainer.accelerator.mixed_precision
    if name == "DeepSpeedEngine":
        zero_stage = wrapped.zero_optimization_stage()
        precision = "bf16" if wrapped.torch_autocast_enabled() else str(wrapped.get_data_types()[0])
    names = {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}
    return {
        "engine": name,
        "zero_stage": zero_stage,
        "world_size": trainer.accelerator.num_processes,
        "sequence_parallel_size": 1 if trainer.row_ranks is None else trainer.row_ranks.size,
        "precision": names.get(precision, precision.removeprefix("torch.")),
    }


def check_engine(trainer: SambayTrainer) -> None:
    """Raise UserError unless training runs on the engine that was asked for: libraries fall back without a word."""
    args: Any = trainer.args
    asked, running = asked_engine(args, trainer.sequence_parallel_size), running_engine(trainer)
    wrong = [f"{key} {running[key]} in place of {asked[key]}" for key in asked if running[key] != asked[key]]
    if wrong:
        raise UserError(f"This stage would train on another engine than it asks for: {', '.join(wrong)}.")


def whole_weights(trainer: SambayTrainer) -> dict[str, Tensor] | None:
    """The trained weights on the CPU, where an engine holds them in its own way; None: the model has them as they are.

    To be called on every rank: rank 0 gets the float32 masters, tied ones once and under LoRA the trained ones alone,
    the others an empty dict.
    """
    engine: Any = trainer.model_wrapped
    model = trainer.model
    if type(engine).__name__ != "DeepSpeedEngine":
        return None
    if engine.zero_optimization_stage() == 3:
        # On all ranks together, layer by layer; on rank 0 alone the answer is something.
        state = engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=hasattr(model, "peft_config"))
    else:
        state = model.state_dict() if is_main() else None
    if state is None:
        return {}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    left_out = frozen if hasattr(model, "peft_config") else set(model.all_tied_weights_keys)
    return {name: _of_its_own(tensor) for name, tensor in state.items() if name not in left_out}


def _of_its_own(tensor: Tensor) -> Tensor:
    """A tensor on the CPU that shares its memory with no other: engines keep many in one flat buffer."""
    tensor = tensor.detach().cpu()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
