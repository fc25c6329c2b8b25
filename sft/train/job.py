"""A stage's training, put together: the trainer, what is done after each step, and what watches over it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.train.answering import begin_answering
from sft.train.batch import asked_share
from sft.train.checkpoints import (
    Checkpoint,
)
from sft.train.collator import SOURCES
from sft.train.engine import asked_engine
from sft.train.handover import save_final
from sft.train.interrupt import StopSignals
from sft.train.objective import Objective, refuse_own_loss
from sft.train.schedule import check_schedule
from sft.utils.distributed import alike, decide, world_size
from sft.utils.errors import UsageError, UserError, disk_full, first_line, lost_peer

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import SFTConfig

    from sft.models.average import Average
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage
    from sft.train.callbacks import Progress
    from sft.train.evaluations import Answer
    from sft.train.outcome import Outcome
    from sft.train.parallel.exchange import Ranks
    from sft.train.probe import LossScaling
    from sft.train.trainer import SambayTrainer
    from sft.train.validation import Validation

COLUMNS = ["input_ids", "assistant_masks", "seq_lengths"]


@dataclass
class Job:
    """One stage's training, put together; `engine` is the one that it asks for."""

    stage: Stage
    paths: RunPaths
    trainer: SambayTrainer
    progress: Progress
    checkpoint: Checkpoint | None
    engine: dict[str, Any]
    outcome: Outcome
    base: dict[str, Any] | None
    validation: Validation | None = None

    def save(self, folder: Path, tokenizer: Any, weights: dict[str, Any] | None, average: Average | None) -> None:
        """Write what is handed on, or could be."""
        save_final(folder, self.trainer.model, tokenizer, base=self.base, weights=weights, average=average)


def put_together(
    stage: Stage,
    paths: RunPaths,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> Job:
    from transformers import PrinterCallback

    from sft.train.callbacks import Progress
    from sft.train.dropout import drop_by_documents
    from sft.train.ema import Ema
    from sft.train.outcome import Outcome
    from sft.train.telling import never_fail
    from sft.train.trainer import SambayTrainer

    objective, sources = Objective.of(stage.train), sources_of(rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    told_too = {"pad_token_id": pad or 0, "normalize": objective.normalize, "sources": sources}
    drawn = drop_by_documents(model, stage.train.seed)
    told_too["keys"] = drawn is not None
    collator, scaling, ranks = _how_rows_are_run(stage, model, args, told_too)
    progress = Progress(stage.name)
    try:
        trainer = SambayTrainer(
            model,
            args=args,
            loss_scaling=scaling,
            objective=objective,
            identity=identity,
            counters=checkpoint.marker["counters"] if checkpoint else None,
            sources=sources,
            row_ranks=ranks,
            data_collator=collator,
            train=stage.train,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=[*_log(stage, paths, args, checkpoint), progress],
        )
    except ValueError as error:
        raise UsageError(f"stages[{stage.name}].train: {first_line(error)}") from error
    trainer.drawn = drawn
    trainer.remove_callback(PrinterCallback)
    never_fail(trainer.callback_handler.callbacks)
    engine = asked_engine(args, stage.train.sequence_parallel_size)
    _note_engines(trainer, stage, engine, checkpoint)
    if stage.train.ema is not None:
        trainer.ema = Ema(trainer.model, stage.train.ema, checkpoint.path if checkpoint else None)
        trainer.add_callback(trainer.ema)
    steps = trainer.steps_of_the_stage
    outcome = Outcome(stage, paths.stage_dir(stage.name), identity, steps, trainer.steps_of_an_epoch)
    with alike():
        check_schedule(stage.train, steps, stage.name)
        outcome.check(checkpoint.step if checkpoint else 0)
    outcome.keep_start(model)
    trainer.wanted_checkpoints = outcome.wanted
    return Job(stage, paths, trainer, progress, checkpoint, engine, outcome, identity["base"])


def _log(stage: Stage, paths: RunPaths, args: SFTConfig, checkpoint: Checkpoint | None) -> list[Any]:
    """What writes down a stage's numbers."""
    from sft.train.callbacks import EventsFile, MetricsFile, tensorboard_callback

    files: list[Any] = [MetricsFile(paths.metrics(stage.name)), EventsFile(paths.events(stage.name))]
    if args.should_save:
        files += tensorboard_callback(paths.tensorboard(stage.name), checkpoint.step if checkpoint else 0)
    return files


def _how_rows_are_run(
    stage: Stage, model: Any, args: SFTConfig, told_too: Mapping[str, Any]
) -> tuple[Any, LossScaling, Ranks | None]:
    """The collator, chosen and probed on the path that is trained; how the model's own loss is scaled; and the ranks
    that share rows. `told_too`: what the collator is told beside, by its own names."""
    from sft.train.parallel.collate import shared_rows
    from sft.train.parallel.groups import ranks_of_a_row
    from sft.train.parallel.probe import sharing_probe
    from sft.train.probe import TrainedPath, choose_collator, chunk_own_loss, loss_scaling

    path, pad = TrainedPath.of(args, stage.train.max_length), told_too["pad_token_id"]
    chosen = decide(lambda: choose_collator(model, packing=stage.train.packing, pad_token_id=pad, path=path))
    chunk_own_loss(model, chosen, path)
    refuse_own_loss(model, Objective.of(stage.train), stage.name)
    scaling = decide(lambda: loss_scaling(model, chosen, path))
    collator, ranks = type(chosen)(**told_too), ranks_of_a_row(stage.train.sequence_parallel_size)
    if ranks is None:
        return collator, scaling, None
    shared = shared_rows(collator, model, ranks, stage.name)
    sharing_probe(model, shared, ranks, path)
    return shared, scaling, ranks


def _note_engines(trainer: SambayTrainer, stage: Stage, engine: dict[str, Any], checkpoint: Checkpoint | None) -> None:
    """Let the trainer know what it runs on, and whether its checkpoint is of something else."""
    asked = asked_share(stage)
    trainer.ran_on = {**engine, "asked": asked.rows * asked.micro_batches}
    if checkpoint is None:
        return
    before = checkpoint.marker["ran_on"]
    trainer.other_processes = before["world_size"] != engine["world_size"]
    moved = trainer.other_processes or before["zero_stage"] != engine["zero_stage"]
    # Without DeepSpeed each process holds the whole state, and reads it as it is.
    trainer.other_engine = moved and (before["zero_stage"], engine["zero_stage"]) != (None, None)
    if not moved:
        return
    with alike():
        if 0 in (before["zero_stage"], engine["zero_stage"]):
            raise UserError(
                f"{checkpoint.path} was written by {before['world_size']} processes, and DeepSpeed without ZeRO can't "
                "go on with that on others: start as many, or use zero1."
            )
        if trainer.args.dataloader_drop_last:
            raise UserError(
                f"{checkpoint.path} was written by {before['world_size']} processes; others would leave out other "
                "rows under dataloader_drop_last: start as many."
            )


def set_guard(job: Job, dataset: Dataset) -> None:
    """Have the stage's guard look at each step, before anything else is done after it."""
    from sft.train.guard import Guard
    from sft.train.guarded import GuardedSteps

    settings, trainer, name = job.stage.train.guard, job.trainer, job.stage.name
    if settings is None:
        return
    kept = job.checkpoint.marker["counters"].get("guard") if job.checkpoint else None
    guard = Guard(settings, job.paths.stage_dir(name), clip=job.stage.train.max_grad_norm, kept=kept)

    def documents(row: int) -> list[str]:
        if row >= len(dataset):  # an empty one, which fills up an epoch's last step
            return []
        return list(dataset[row]["document_ids"]) if "document_ids" in dataset.column_names else [str(row)]

    saved, wanted = job.outcome.saved, job.outcome.wanted
    trainer.guarded = GuardedSteps(trainer, guard, documents, saved)
    newest = min(2, job.stage.train.save_total_limit or 2)
    trainer.wanted_checkpoints = lambda step: wanted(step) | set(saved(step)[-newest:])
    trainer.callback_handler.callbacks.insert(0, trainer.guarded)


def watch_over(job: Job) -> None:
    """Room for what is to be written, a watch over whether the stage gets on, and alerts."""
    from sft.train.alerts import Alerts
    from sft.train.space import Room
    from sft.train.watchdog import Watchdog

    trainer, stage, step = job.trainer, job.stage, job.checkpoint.step if job.checkpoint else 0
    trainer.alerts = Alerts(job.paths.alerts, stage.name)
    trainer.add_callback(trainer.alerts)
    trainer.room = Room(trainer, stage.name)
    saves = [saved for saved in job.outcome.saved(trainer.steps_of_the_stage) if saved > step]
    trainer.room.check_start(len(saves), stage.train.save_total_limit)
    if stage.train.stall_timeout is not None:
        stacks = job.paths.stage_dir(stage.name) / "stacks"
        trainer.watchdog = Watchdog(stage.train.stall_timeout, stacks, stage.name, trainer.alerts)
        trainer.callback_handler.callbacks.insert(0, trainer.watchdog)


def look_on(job: Job, held: Any, signals: StopSignals, answer: Answer | None) -> None:
    """What is done after each step, in this order: rows held out (the PreparedStage `held`), epochs, suites, ends."""
    from sft.train.callbacks import StopOnSignal
    from sft.train.evaluations import Evaluations
    from sft.train.memorised import EpochEnds
    from sft.train.stopping import StopWhen
    from sft.train.validation import Validation

    trainer = job.trainer
    if held is not None:
        # The best checkpoint's is told: each that may be it is looked at.
        looked_at = {"candidates": job.outcome.saved} if job.stage.keep_best else {}
        job.validation = Validation(trainer, held.dataset.select_columns(COLUMNS), job.stage.train, **looked_at)
        trainer.add_callback(job.validation)
    trainer.add_callback(EpochEnds(trainer))
    every = job.stage.evaluate.every
    if every is not None:
        assert answer is not None
        point = f"{job.stage.name}, while it trains"
        dtype = decide(lambda: begin_answering(job.paths, job.stage.evaluate, point)).dtype
        trainer.add_callback(Evaluations(trainer, every, answer, signals, dtype))
    trainer.add_callback(StopWhen(trainer, job.stage, job.validation))
    trainer.add_callback(StopOnSignal(signals))


def training_rows(
    dataset: Dataset, args: SFTConfig, stage: str, beside: Sequence[str] = (), data_ranks: int | None = None
) -> Dataset:
    """The stage's rows, filled up with empty ones to whole optimizer steps. `beside`: columns that its loss reads.
    `data_ranks`: how many processes, or groups of them, have rows of their own; None: all.

    Without them accelerate would repeat rows in an epoch's last step when several processes share it, and a repeated
    token would count twice. Empty rows hold no token and take no part in the loss.
    """
    from datasets import Dataset as HFDataset
    from datasets import concatenate_datasets

    if len(dataset) == 0:
        raise UserError(f"Stage {stage} has no row to train on: see the funnel that `sft prepare` prints.")
    missing_columns = [name for name in beside if name not in dataset.column_names]
    if missing_columns:
        raise UserError(f"stages[{stage}].train: its loss reads {missing_columns[0]}, which the rows don't have.")
    told = [SOURCES] if SOURCES in dataset.column_names else []
    rows = dataset.select_columns([*COLUMNS, *told, *beside])
    step = args.per_device_train_batch_size * args.gradient_accumulation_steps * (data_ranks or args.world_size)
    missing = -len(rows) % step
    if missing and not args.dataloader_drop_last:
        empty = HFDataset.from_dict({column: [[]] * missing for column in rows.column_names}, features=rows.features)
        rows = concatenate_datasets([rows, empty])
    if len(rows) < step:
        raise UserError(f"Stage {stage} has {len(rows)} rows, fewer than the {step} of one step; set a smaller batch.")
    return rows.with_format("numpy")


def sources_of(rows: Dataset) -> list[str]:
    """The names of the sources that rows come from, where they tell them."""
    if SOURCES not in rows.column_names:
        return []
    chunks = rows.data.column(SOURCES).chunks
    return sorted({name for chunk in chunks for name in chunk.flatten().unique().to_pylist()})


@contextmanager
def plain_errors(job: Job) -> Iterator[None]:
    """Turn a full disk and an exhausted memory into a sentence."""
    import torch

    where = job.paths.stage_dir(job.stage.name)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory in stage {job.stage.name}: lower per_device_train_batch_size (and raise "
            "gradient_accumulation_steps), lower max_length, or turn gradient_checkpointing on."
        ) from error
    except UserError:
        raise
    except Exception as error:
        if disk_full(error, where):
            raise UserError(
                f"The disk is full at {where}: make room and give the same command again; it continues from the last "
                "whole checkpoint."
            ) from error
        if world_size() > 1 and lost_peer(error):
            raise UserError(
                f"Stage {job.stage.name} has lost another of its processes ({first_line(error)}): see what that said. "
                "The same command continues from the last whole checkpoint."
            ) from error
        raise
