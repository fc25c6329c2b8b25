"""Train one stage: model and prepared data in, `stages/<name>/final` and its manifest out; continues where it was."""

from __future__ import annotations

import errno
import gc
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.lora import attach_adapters, lora_settings
from sft.run.identity import previous_stage, stage_key, stage_parts
from sft.train.arguments import build_arguments
from sft.train.checkpoints import Checkpoint, checkpoint_folders, resumable
from sft.train.handover import fingerprint, save_final
from sft.train.interrupt import Interrupted, StopSignals
from sft.utils.errors import UsageError, UserError, first_line
from sft.utils.files import write_json

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import SFTConfig

    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Recipe, Stage
    from sft.train.callbacks import Progress
    from sft.train.trainer import SambayTrainer

FULL = 1 << 16
"""Bytes left on a disk that counts as full when a write to it has failed."""

COLUMNS = ["input_ids", "assistant_masks", "seq_lengths"]


@dataclass
class _Job:
    """One stage's training, put together."""

    stage: Stage
    layout: RunPaths
    trainer: SambayTrainer
    progress: Progress
    checkpoint: Checkpoint | None


def train_stage(
    recipe: Recipe,
    stage: Stage,
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    layout: RunPaths,
    base: dict[str, Any] | None = None,
    resume: bool = True,
) -> dict[str, Any]:
    """Train `model` on `prepared` (sft.data.prepare.PreparedStage) and hand it on; return the stage's manifest.

    `model` gets fresh adapters when the stage asks for LoRA and it has none yet; `base` then names what they stand on
    (default: the run's start, or the previous stage's weights). With `resume`, training goes on from the newest whole
    checkpoint of the same stage, bit for bit as if it had not stopped; without, its checkpoints are thrown away.

    Raises UserError for a model that mixes documents, leaves trainable tensors without a gradient, diverges, or can't
    be continued from what is there; Interrupted after a signal, with everything saved.
    """
    import torch

    args = build_arguments(stage, layout)
    parts = stage_parts(layout, stage, prepared.manifest["key"])
    model = _ready(model, stage, args)
    handed_base = _base_of(layout, stage, model, base)
    identity = {**parts, "world_size": args.world_size, "base": handed_base}
    folder = layout.stage_dir(stage.name)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = None
    if not resume and args.should_save:
        for _, path in checkpoint_folders(folder):
            shutil.rmtree(path)
    if resume:
        with args.main_process_first(desc="looking for a checkpoint"):
            checkpoint = resumable(folder, identity, remove_broken=args.should_save)
    with StopSignals() as signals, _no_library_bars():
        job = _put_together(stage, layout, model, tokenizer, prepared, args, identity, checkpoint, signals)
        state = _run(job, signals)
        manifest = _hand_over(job, state, tokenizer, prepared, parts, handed_base)
    job.trainer.accelerator.wait_for_everyone()
    del job
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return manifest


def _ready(model: Any, stage: Stage, args: SFTConfig) -> Any:
    """The model in the types it trains in: float32 masters for full fine-tuning (bf16 computes under autocast).

    LoRA keeps the frozen weights as they were loaded, and the adapters in float32. DeepSpeed holds masters of its own.
    """
    settings = lora_settings(stage)
    is_adapter = hasattr(model, "peft_config")
    if settings is None and is_adapter:
        raise UserError(
            f"Stage {stage.name} trains all weights, but the model still carries adapters: merge them first."
        )
    if settings is None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model.float()
    zero_stage = getattr(args.deepspeed_plugin, "zero_stage", 0)
    if zero_stage == 3 and args.gradient_checkpointing:
        raise UsageError(
            f"stages[{stage.name}].train: LoRA with ZeRO-3 and gradient checkpointing needs reentrant checkpointing, "
            "which loses gradients; use zero2, or gradient_checkpointing: false."
        )
    return model if is_adapter else attach_adapters(model, settings, seed=args.seed)


def _base_of(layout: RunPaths, stage: Stage, model: Any, base: dict[str, Any] | None) -> dict[str, Any] | None:
    """What base.json will say: None for a full model."""
    if not hasattr(model, "peft_config"):
        return None
    if base is None:
        before = previous_stage(layout, stage)
        if before is None:
            base = {"kind": "start"}
        else:
            base = {"kind": "folder", "path": str(layout.final_dir(before.name).relative_to(layout.root))}
    return {**base, "fingerprint": fingerprint(model)}


def _put_together(
    stage: Stage,
    layout: RunPaths,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    args: SFTConfig,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
    signals: StopSignals,
) -> _Job:
    from transformers import PrinterCallback

    from sft.train.callbacks import MetricsFile, Progress, StopOnSignal, tensorboard_callback
    from sft.train.probe import choose_collator, chunk_own_loss, loss_scaling
    from sft.train.trainer import SambayTrainer

    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if not args.use_cpu:
        model.to(args.device)
    collator = choose_collator(model, packing=stage.train.packing, pad_token_id=pad or 0)
    chunk_own_loss(model, collator)
    progress = Progress(stage.name)
    callbacks = [MetricsFile(layout.metrics(stage.name)), progress, StopOnSignal(signals)]
    if args.should_save:
        callbacks.append(tensorboard_callback(layout.tensorboard(stage.name), checkpoint.step if checkpoint else 0))
    try:
        trainer = SambayTrainer(
            model,
            args=args,
            loss_scaling=loss_scaling(model, collator),
            identity=identity,
            counters=checkpoint.marker["counters"] if checkpoint else None,
            data_collator=collator,
            train_dataset=training_rows(prepared.dataset, args, stage.name),
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    except ValueError as error:
        raise UsageError(f"stages[{stage.name}].train: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    return _Job(stage, layout, trainer, progress, checkpoint)


def training_rows(dataset: Dataset, args: SFTConfig, stage: str) -> Dataset:
    """The stage's rows, filled up with empty ones to whole optimizer steps.

    Without them accelerate would repeat rows in an epoch's last step when several processes share it, and a repeated
    token would count twice. Empty rows hold no token and take no part in the loss.
    """
    from datasets import Dataset as HFDataset
    from datasets import concatenate_datasets

    if len(dataset) == 0:
        raise UserError(f"Stage {stage} has no row to train on: see the funnel that `sft prepare` prints.")
    rows = dataset.select_columns(COLUMNS)
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    missing = -len(rows) % step
    if missing and not args.dataloader_drop_last:
        empty = HFDataset.from_dict({column: [[]] * missing for column in COLUMNS}, features=rows.features)
        rows = concatenate_datasets([rows, empty])
    if len(rows) < step:
        raise UserError(f"Stage {stage} has {len(rows)} rows, fewer than the {step} of one step; set a smaller batch.")
    return rows.with_format("numpy")


def _run(job: _Job, signals: StopSignals) -> TrainerState:
    """Train to the end, or raise Interrupted with a checkpoint saved."""
    from transformers import TrainerState

    trainer, checkpoint = job.trainer, job.checkpoint
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            # Killed between the last step and the hand-over; going on would train one step too many.
            trainer.create_optimizer()
            trainer._load_from_checkpoint(str(checkpoint.path))
            return state
    with _plain_errors(job):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        finally:
            job.progress.close()
    if signals.received is not None and trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {job.stage.name}, "
            "everything saved. The same command continues.",
            signals.received,
        )
    return trainer.state


def _hand_over(
    job: _Job,
    state: TrainerState,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    parts: dict[str, Any],
    base: dict[str, Any] | None,
) -> dict[str, Any]:
    """Write `final/`, then the manifest that declares the stage done."""
    from sft.utils.environment import environment

    trainer, layout, name = job.trainer, job.layout, job.stage.name
    manifest = {
        "key": stage_key(parts),
        "parts": parts,
        "stage": name,
        "steps": state.global_step,
        "epochs": state.epoch,
        "counters": {key: round(value, 3) for key, value in trainer.counters.items()},
        "final_loss": next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
        "world_size": trainer.args.world_size,
        "engine": type(trainer.model_wrapped).__name__,
        "lora": lora_settings(job.stage),
        "base": base,
        "data": {key: value for key, value in prepared.manifest.items() if key != "rows_dropped"},
        "collator": type(trainer.data_collator).__name__,
        "environment": environment(),
    }
    trainer.restore_config()
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_deepspeed_enabled else None
    if trainer.args.should_save:
        with _plain_errors(job):
            save_final(layout.final_dir(name), trainer.model, tokenizer, base=base, weights=weights)
            write_json(layout.stage_manifest(name), manifest)
    return manifest


@contextmanager
def _no_library_bars() -> Iterator[None]:
    """Keep transformers' own progress bars, one for each file saved, off the terminal."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def _plain_errors(job: _Job) -> Iterator[None]:
    """Turn a full disk and an exhausted memory into a sentence."""
    import torch

    where = job.layout.stage_dir(job.stage.name)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory in stage {job.stage.name}: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), lower max_length, or turn gradient_checkpointing on."
        ) from error
    except Exception as error:
        if _is_full(error, where):
            raise UserError(
                f"The disk is full at {where}: make room and give the same command again; it continues from the last "
                "whole checkpoint."
            ) from error
        raise


def _is_full(error: BaseException, folder: Path) -> bool:
    """Whether an error comes from a full disk. torch and safetensors hide the errno, so the disk is asked too."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return "No space left" in str(error) or shutil.disk_usage(folder).free < FULL
