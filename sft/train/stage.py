"""Train one stage: model and prepared data in, `stages/<name>/final` and its manifest out; continues where it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.four_bit import is_four_bit
from sft.models.lora import attach_adapters, lora_settings
from sft.models.lora_targets import check_targets
from sft.models.rounded_rows import rounded_rows
from sft.models.widen import widened
from sft.recipe.outcome_keys import HANDS_ON
from sft.train.answering import begin_answering
from sft.train.arguments import build_arguments
from sft.train.batch import asked_share, note_begun, share_of
from sft.train.checkpoints import (
    Checkpoint,
    checkpoint_folders,
    describe_difference,
    keep_weights_only,
    remove,
    resumable,
)
from sft.train.collator import SOURCES
from sft.train.engine import asked_engine, fresh_engine, switched_as_outside, whole_weights
from sft.train.handover import save_final
from sft.train.interrupt import Interrupted, StopSignals, stop_signals
from sft.train.objective import Objective, refuse_own_loss
from sft.train.optimizer import check_groups, hold_weights
from sft.train.parallel.groups import DataRanks
from sft.train.precision import precision_of
from sft.train.recompute import recompute_as_asked
from sft.train.sharded import is_sharded
from sft.train.what_runs import told, what_runs
from sft.utils.distributed import alike, decide, gather, is_main, world_size
from sft.utils.errors import UsageError, UserError, disk_full, first_line, lost_peer
from sft.utils.files import remove_file, sha256_file, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes
from sft.utils.memory import keep_freed_memory
from sft.utils.quiet import no_library_bars
from sft.utils.say import say

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import SFTConfig

    from sft.models.average import Average
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Recipe, Stage
    from sft.train.callbacks import Progress
    from sft.train.evaluations import Answer
    from sft.train.outcome import Outcome
    from sft.train.parallel.exchange import Ranks
    from sft.train.probe import LossScaling
    from sft.train.trainer import SambayTrainer

SHARED_OUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed")
COLUMNS = ["input_ids", "assistant_masks", "seq_lengths"]


@dataclass
class _Job:
    """One stage's training, put together; `engine` is the one that it asks for."""

    stage: Stage
    paths: RunPaths
    trainer: SambayTrainer
    progress: Progress
    checkpoint: Checkpoint | None
    engine: dict[str, Any]
    outcome: Outcome
    base: dict[str, Any] | None

    def save(self, folder: Path, tokenizer: Any, weights: dict[str, Any] | None, average: Average | None) -> None:
        """Write what is handed on, or could be."""
        save_final(folder, self.trainer.model, tokenizer, base=self.base, weights=weights, average=average)


@dataclass
class _Scores:
    """How checkpoints are compared, and the signals that end that."""

    score: Callable[[Path, int], float] | None
    signals: StopSignals

    def best(self, job: _Job, end: int, save: Callable[[Path, Average], None]) -> dict[str, Any]:
        """The best checkpoint of a stage that has ended at `end`, on all processes; `save` makes a model folder of one.

        All processes answer, each with a model of its own; the folder is the main one's to write.
        """
        from sft.train.callbacks import share_signal
        from sft.utils.files import scratch_folder

        assert self.score is not None
        score = self.score
        # Room for the model that answers.
        job.trainer.accelerator.free_memory()
        job.trainer.optimizer = job.trainer.lr_scheduler = None
        job.trainer.model.to("cpu")

        def of(average: Average, step: int) -> float:
            if signum := share_signal(self.signals):
                raise Interrupted(
                    f"Stopped while the checkpoints of stage {job.stage.name} are compared; it is trained. The same "
                    "command continues.",
                    signum,
                )
            with ExitStack() as made, switched_as_outside():
                candidate = scratch_folder(job.paths.stage_dir(job.stage.name) / "candidate")
                folder = decide(lambda: made.enter_context(candidate)) / "model"
                decide(lambda: save(folder, average))
                return score(folder, step)

        return job.outcome.best(end, of)


@fresh_engine()
def train_stage(
    recipe: Recipe,
    stage: Stage,
    *,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    paths: RunPaths,
    parts: dict[str, Any],
    base: dict[str, Any] | None = None,
    resume: bool = True,
    started: Callable[[], None] | None = None,
    score: Callable[[Path, int], float] | None = None,
    answer: Answer | None = None,
) -> dict[str, Any]:
    """Train `model` on `prepared` (sft.data.prepare.PreparedStage) and hand it on; return the stage's manifest.

    `parts` is what the stage's weights follow from. `model` gets fresh adapters when the stage asks for LoRA and it has
    none yet; `base` then names what they stand on. `started` is called once nothing refuses the stage any more, before
    anything of it is written. `score`: how good the model in a folder, of a step, is for `keep_best`; asked on all
    processes. `answer`: for `evaluate.every`. With `resume`, training goes on from the newest whole checkpoint of the
    same stage, bit for bit as if it had not stopped; without, its checkpoints are thrown away.
    Raises UserError for a model that mixes documents, leaves trainable tensors without a gradient, diverges, or can't
    be continued from what is there; Interrupted after a signal, with everything saved.
    """
    from sft.models.savable import check_savable
    from sft.train.callbacks import share_signal

    folder, trained = paths.stage_dir(stage.name), what_is_trained(parts, base)
    sharing = stage.train.sequence_parallel_size
    with_rows = DataRanks.of(sharing).count
    precision = decide(lambda: precision_of(stage, paths, resume=resume))
    share = decide(lambda: share_of(stage, folder, trained, with_rows, resume=resume))
    args = build_arguments(stage, paths, bf16=precision.bf16, share=share)
    if args.use_cpu:
        keep_freed_memory()
    check_savable(model, tokenizer, say)
    model = _ready(model, stage, args)
    check_groups(model, stage.train, f"stages[{stage.name}].train")
    runs, rows_of_a_step = what_runs(model, args, sharing), share.rows * share.micro_batches * with_rows
    identity = {**trained, "precision": runs["precision"], "kernels": runs["kernels"], "rows_of_a_step": rows_of_a_step}
    held = getattr(prepared, "validation", None)
    with alike():
        rows = training_rows(prepared.dataset, args, stage.name, Objective.of(stage.train).columns, with_rows)
        _refuse_different_ranks({**identity, **runs, "rows": len(rows)})
    checkpoint = decide(lambda: _beginning(folder, identity, resume))
    if started is not None:
        started()
    decide(lambda: note_begun(folder, trained, asked_share(stage), rows_of_a_step))
    for line in told(stage.name, runs, precision):
        say(line)
    compiled = bool(args.use_cpu and args.bf16)  # its products, by oneDNN
    with stop_signals() as signals, no_library_bars(), rounded_rows(model, compiled):
        job = _put_together(stage, paths, model, tokenizer, rows, args, identity, checkpoint)
        _guard(job, prepared.dataset)
        _watch_over(job)
        _look_on(job, held, signals, answer)
        with signals.saving():
            state = _run(job, signals)
            manifest = _hand_over(job, state, tokenizer, prepared, parts, _Scores(score, signals))
            signum = share_signal(signals)
    job.trainer.accelerator.free_memory()
    if signum:
        raise Interrupted(f"Stopped after stage {stage.name}, which is done. The same command continues.", signum)
    signals.check()
    return manifest


def what_is_trained(parts: dict[str, Any], base: dict[str, Any] | None) -> dict[str, Any]:
    """What a stage's checkpoints are of: its `parts`, but for what changes nothing of what its steps come to.

    What is made of the checkpoints is no part of the training that made them; nor is on what engine, and in how many
    micro-batches, the rows of a step are trained, whose number is.
    """
    trained = {key: value for key, value in parts.items() if key != HANDS_ON}
    return {**trained, "train": {k: v for k, v in parts["train"].items() if k not in SHARED_OUT}, "base": base}


def _refuse_different_ranks(identity: dict[str, Any]) -> None:
    """Raise UserError unless all ranks are about to train the same: they average gradients whatever these are of."""
    found = gather(identity)
    for rank, other in enumerate(found):
        if difference := describe_difference(found[0], other):
            raise UserError(
                f"Rank {rank} would train something else than rank 0: from that to this, {difference}. Let all nodes "
                "see the same files and have the same versions of everything."
            )


def _beginning(folder: Path, identity: dict[str, Any], resume: bool) -> Checkpoint | None:
    """The checkpoint to go on from; without `resume`, none is left."""
    if resume:
        return resumable(folder, identity)
    for _, path in checkpoint_folders(folder):
        remove(path)
    return None


def _ready(model: Any, stage: Stage, args: SFTConfig) -> Any:
    """The model in the types it trains in: by default float32 for full fine-tuning (bf16 computes under autocast).

    LoRA keeps the frozen weights as they were loaded, and the adapters in float32.
    """
    recompute_as_asked(model, stage.train, args)
    settings = lora_settings(stage)
    is_adapter = hasattr(model, "peft_config")
    if settings is None and is_adapter:
        raise UserError(
            f"Stage {stage.name} trains all weights, but the model still carries adapters: merge them first."
        )
    if settings is None:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        if is_sharded(args):
            # The others' weights stay where they are until they are cut up.
            return widened(model, args.device, by_itself=True) if is_main() else model
        hold_weights(widened(model, args.device), stage.train.weights_dtype)
        return model
    if is_adapter:
        return model
    check_targets(model, settings, f"stages[{stage.name}].train")
    return attach_adapters(model, settings, seed=args.seed)


def _put_together(
    stage: Stage,
    paths: RunPaths,
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    args: SFTConfig,
    identity: dict[str, Any],
    checkpoint: Checkpoint | None,
) -> _Job:
    from transformers import PrinterCallback

    from sft.train.callbacks import EventsFile, MetricsFile, Progress, tensorboard_callback
    from sft.train.ema import Ema
    from sft.train.outcome import Outcome
    from sft.train.telling import never_fail
    from sft.train.trainer import SambayTrainer

    # Weights in 4 bits were loaded to where they are.
    if not args.use_cpu and not is_four_bit(model) and (is_main() or not is_sharded(args)):
        model.to(args.device)
    objective, sources = Objective.of(stage.train), sources_of(rows)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    told_too = {"pad_token_id": pad or 0, "normalize": objective.normalize, "sources": sources}
    collator, scaling, ranks = _how_rows_are_run(stage, model, args, told_too)
    progress = Progress(stage.name)
    callbacks: list[Any] = [MetricsFile(paths.metrics(stage.name)), EventsFile(paths.events(stage.name)), progress]
    if args.should_save:
        callbacks += tensorboard_callback(paths.tensorboard(stage.name), checkpoint.step if checkpoint else 0)
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
            callbacks=callbacks,
        )
    except ValueError as error:
        raise UsageError(f"stages[{stage.name}].train: {first_line(error)}") from error
    trainer.remove_callback(PrinterCallback)
    never_fail(trainer.callback_handler.callbacks)
    _note_engines(trainer, stage, args, checkpoint)
    if stage.train.ema is not None:
        trainer.ema = Ema(trainer.model, stage.train.ema, checkpoint.path if checkpoint else None)
        trainer.add_callback(trainer.ema)
    steps = trainer.steps_of_the_stage
    outcome = Outcome(stage, paths.stage_dir(stage.name), identity, steps, trainer.steps_of_an_epoch)
    with alike():
        outcome.check()
    outcome.keep_start(model)
    trainer.wanted_checkpoints = outcome.wanted
    engine = asked_engine(args, stage.train.sequence_parallel_size)
    return _Job(stage, paths, trainer, progress, checkpoint, engine, outcome, identity["base"])


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


def _note_engines(trainer: SambayTrainer, stage: Stage, args: SFTConfig, checkpoint: Checkpoint | None) -> None:
    """Let the trainer know what it runs on, and whether its checkpoint is of something else."""
    asked, engine = asked_share(stage), asked_engine(args, stage.train.sequence_parallel_size)
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


def _guard(job: _Job, dataset: Dataset) -> None:
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


def _watch_over(job: _Job) -> None:
    """Room for what is to be written, and a watch over whether the stage gets on."""
    from sft.train.space import Room
    from sft.train.watchdog import Watchdog

    trainer, stage, step = job.trainer, job.stage, job.checkpoint.step if job.checkpoint else 0
    trainer.room = Room(trainer, stage.name)
    saves = [saved for saved in job.outcome.saved(trainer.steps_of_the_stage) if saved > step]
    trainer.room.check_start(len(saves), stage.train.save_total_limit)
    if stage.train.stall_timeout is not None:
        stacks = job.paths.stage_dir(stage.name) / "stacks"
        trainer.watchdog = Watchdog(stage.train.stall_timeout, stacks, stage.name)
        trainer.callback_handler.callbacks.insert(0, trainer.watchdog)


def _look_on(job: _Job, held: Any, signals: StopSignals, answer: Answer | None) -> None:
    """What is done after each step, in this order: rows held out (the PreparedStage `held`), epochs, suites, ends."""
    from sft.train.callbacks import StopOnSignal
    from sft.train.evaluations import Evaluations
    from sft.train.memorised import EpochEnds
    from sft.train.stopping import StopWhen
    from sft.train.validation import Validation

    trainer, validation = job.trainer, None
    if held is not None:
        validation = Validation(trainer, held.dataset.select_columns(COLUMNS), job.stage.train)
        trainer.add_callback(validation)
    trainer.add_callback(EpochEnds(trainer))
    every = job.stage.evaluate.every
    if every is not None:
        assert answer is not None
        point = f"{job.stage.name}, while it trains"
        dtype = decide(lambda: begin_answering(job.paths, job.stage.evaluate, point)).dtype
        trainer.add_callback(Evaluations(trainer, every, answer, signals, dtype))
    trainer.add_callback(StopWhen(trainer, job.stage, validation))
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


def _run(job: _Job, signals: StopSignals) -> TrainerState:
    """Train to the end, or raise Interrupted with a checkpoint saved."""
    from transformers import TrainerState

    from sft.train.evaluations import EndedAtOnce

    trainer, checkpoint = job.trainer, job.checkpoint
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(checkpoint.path / "trainer_state.json"))
        if _ended(job, state):
            # Killed between the last step and the hand-over; going on would train one step too many.
            trainer.create_optimizer()
            trainer._load_from_checkpoint(str(checkpoint.path))
            trainer.state = state
            return state
        if checkpoint.marker.get("weights_only"):
            with alike():
                raise UserError(
                    f"{checkpoint.path} holds weights alone, as those of a stage that is done: start the stage again "
                    f"with --restart {job.stage.name}."
                )
    with _plain_errors(job), suppress(EndedAtOnce):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        finally:
            job.progress.close()
            if trainer.watchdog is not None:
                trainer.watchdog.close()
    if signals.received is not None and not _ended(job, trainer.state):
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {job.stage.name}, "
            "everything saved. The same command continues.",
            signals.received,
        )
    return trainer.state


def _ended(job: _Job, state: TrainerState) -> bool:
    """Whether all steps are done, or all that the stage needs."""
    from sft.train.stopping import stopped_at

    return state.global_step >= state.max_steps or stopped_at(job.stage, state) is not None


def _hand_over(
    job: _Job,
    state: TrainerState,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    parts: dict[str, Any],
    scores: _Scores,
) -> dict[str, Any]:
    """Write `final/`, then the manifest that declares the stage done."""
    from sft.models.average import Average
    from sft.train.callbacks import write_metrics
    from sft.train.stopping import stopped_at
    from sft.utils.environment import environment

    trainer, paths, name = job.trainer, job.paths, job.stage.name
    manifest = {
        "key": sha256_json(parts),
        "parts": parts,
        "stage": name,
        "recipe": job.stage.model_dump(),
        "train": job.stage.train.complete(cuda=not trainer.args.use_cpu, bf16=job.engine["precision"] == "bfloat16"),
        "steps": state.global_step,
        "stopped": stopped_at(job.stage, state) if state.global_step < state.max_steps else None,
        "epochs": state.epoch,
        "counters": {key: round(value, 3) for key, value in trainer.counters.items()},
        "validation": _validation(getattr(prepared, "validation", None), state.log_history),
        "token_statistics": trainer.token_sums.epochs,
        "left_out": _left_out(trainer),
        "final_loss": next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
        **{**job.engine, "kernels": trainer.identity["kernels"]},
        "engine": job.engine["engine"] or type(trainer.model).__name__,
        "lora": lora_settings(job.stage),
        "base": job.base,
        "data": {key: value for key, value in prepared.manifest.items() if key != "rows_dropped"},
        "collator": type(trainer.data_collator).__name__,
        "environment": environment(),
    }
    trainer.check_finite()
    trainer.restore_config()
    weights = whole_weights(trainer)
    if trainer.ema is not None and is_main():
        weights = trainer.ema.weights(trainer.model.state_dict() if weights is None else weights)

    if job.stage.keep_best:
        with _plain_errors(job):
            manifest["best"] = scores.best(
                job, state.global_step, lambda to, one: job.save(to, tokenizer, weights, one)
            )

    def write() -> dict[str, Any]:
        with _plain_errors(job):
            average = job.outcome.average(state.global_step)
            if job.stage.keep_best:
                average = Average([job.outcome.checkpoint(manifest["best"]["step"])])
            manifest["average"] = job.outcome.parents or None
            # What was handed on before, if the stage is handed on anew: it isn't done until that is whole.
            remove_file(paths.stage_manifest(name))
            job.save(paths.final_dir(name), tokenizer, weights, average)
            write_metrics(paths.metrics(name), state.log_history)
            manifest["metrics"] = sha256_file(paths.metrics(name))
            manifest["files"] = folder_hashes(paths.final_dir(name))
            write_sealed(paths.stage_manifest(name), manifest)
            job.outcome.forget_start()
            if not job.stage.train.keep_optimizer:
                keep_weights_only(paths.stage_dir(name))
        return manifest

    return decide(write)


def _left_out(trainer: SambayTrainer) -> dict[str, Any] | None:
    """The steps that the guard left out, and its returns to checkpoints; None where there are none."""
    if trainer.guarded is None or not trainer.guarded.guard.skipped:
        return None
    guard = trainer.guarded.guard
    return {"steps": [line["step"] for line in guard.skipped], "returns": guard.rolled_back}


def _validation(held: Any, history: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What is told of the held-out rows (a PreparedStage): how many, and their loss before and after training."""
    if held is None:
        return None
    losses = [log["eval_loss"] for log in history if "eval_loss" in log]
    told = {key: held.manifest[key] for key in ("key", "documents", "tokens", "supervised_tokens")}
    return {**told, "loss_at_start": losses[0], "loss_at_end": losses[-1], "lowest_loss": min(losses)}


@contextmanager
def _plain_errors(job: _Job) -> Iterator[None]:
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
