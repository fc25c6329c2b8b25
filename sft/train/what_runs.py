"""What a stage runs on, told and part of what a checkpoint is known by: engine, processes, precision, kernels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from sft.models.merge import base_of
from sft.train.engine import asked_engine, autocast_dtype
from sft.utils.errors import UserError

if TYPE_CHECKING:
    from trl import SFTConfig

    from sft.train.precision import Precision

ENGINES = {None: "no engine", "DistributedDataParallel": "DDP"}


def training_kernels(model: Any, args: SFTConfig) -> dict[str, str]:
    """Op -> the backend that trains it here; empty for a model without ops of ours. Other kernels round otherwise, so a
    run that goes on with them wouldn't be the same run.

    Raises UserError where SAMBAY_KERNELS asks for what can't run here.
    """
    import sambay_kernels  # noqa: F401  (registers the ops)
    import torch
    from sambay_kernels.runtime.dispatch import BackendError, ops, why

    if getattr(base_of(model).config, "model_type", None) != "phi4flash":
        return {}
    device, dtype = "cpu" if args.use_cpu else args.device.type, autocast_dtype(args) or torch.float32
    try:
        # What answers are generated with has no part in training.
        trained = [name for name in ops() if not name.endswith("_step") and name != "choose_token"]
        return {name: why(name, device, dtype).backend for name in trained}
    except BackendError as error:
        raise UserError(f"{error}") from error


def what_runs(model: Any, args: SFTConfig, sequence_parallel_size: int = 1) -> dict[str, Any]:
    """The engine that a stage asks for, and the kernels that it gets."""
    return {**asked_engine(args, sequence_parallel_size), "kernels": training_kernels(model, args)}


def told(stage: str, runs: Mapping[str, Any], precision: Precision) -> Iterator[str]:
    """The first lines of a stage's log."""
    zero, world = runs["zero_stage"], runs["world_size"]
    engine = f"ZeRO-{zero}" if zero is not None else ENGINES.get(runs["engine"], runs["engine"])
    kernels: dict[str, list[str]] = {}
    for op, backend in runs["kernels"].items():
        kernels.setdefault(backend, []).append(op)
    usual = max(kernels, key=lambda name: len(kernels[name]), default="the model's own")
    others = [f"{name} for {', '.join(found)}" for name, found in kernels.items() if name != usual]
    processes = "1 process" if world == 1 else f"{world} processes"
    yield f"{stage}: {engine} on {processes}; kernels: {'; '.join([usual, *others])}"
    yield f"{stage}: computes in {precision}"
