"""Train one stage: model and prepared data in, `stages/<name>/final` and its manifest out; continues where it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.four_bit import is_four_bit
from sft.models.lora import attach_adapters, lora_settings
from sft.models.lora_targets import check_targets
from sft.models.rounded_rows import rounded_rows
from sft.models.widen import widened
from sft.recipe.outcome_keys import HANDS_ON
from sft.train.arguments import build_arguments
from sft.train.batch import asked_share, note_begun, share_of
from sft.train.checkpoints import (
    Checkpoint,
    checkpoint_folders,
    describe_difference,
    remove,
    resumable,
)
from sft.train.engine import fresh_engine
from sft.train.hand_on import Scores, hand_over
from sft.train.interrupt import Interrupted, StopSignals, stop_signals
from sft.train.job import Job, look_on, plain_errors, put_together, set_guard, training_rows, watch_over
from sft.train.objective import Objective
from sft.train.optimizer import check_groups, hold_weights
from sft.train.parallel.groups import DataRanks
from sft.train.precision import Precision, precision_of
from sft.train.recompute import recompute_as_asked
from sft.train.sharded import is_sharded
from sft.train.track import track
from sft.train.what_runs import told, what_runs
from sft.utils.distributed import alike, decide, gather, is_main
from sft.utils.errors import RestartError, UserError
from sft.utils.memory import keep_freed_memory
from sft.utils.quiet import no_library_bars
from sft.utils.say import say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState
    from trl import SFTConfig

    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Recipe, Stage
    from sft.train.evaluations import Answer

SHARED_OUT = ("per_device_train_batch_size", "gradient_accumulation_steps", "deepspeed")


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
    args, precision, rows_of_a_step = _arguments(stage, paths, trained, resume)
    check_savable(model, tokenizer, say)
    model = _on_device(_ready(model, stage, args), args)
    check_groups(model, stage.train, f"stages[{stage.name}].train")
    runs = what_runs(model, args, stage.train.sequence_parallel_size)
    identity = {**trained, **{key: runs[key] for key in ("precision", "kernels")}, "rows_of_a_step": rows_of_a_step}
    with alike():
        ranks = DataRanks.of(stage.train.sequence_parallel_size).count
        rows = training_rows(prepared.dataset, args, stage.name, Objective.of(stage.train).columns, ranks)
        _refuse_different_ranks({**identity, **runs, "rows": len(rows)})
    checkpoint = decide(lambda: _beginning(folder, identity, resume))
    if started is not None:
        started()
    decide(lambda: note_begun(folder, trained, asked_share(stage), rows_of_a_step))
    for line in told(stage.name, runs, precision):
        say(line)
    with stop_signals() as signals, no_library_bars(), rounded_rows(model, bool(args.use_cpu and args.bf16)):
        job = put_together(stage, paths, model, tokenizer, rows, args, identity, checkpoint)
        track(job, prepared.manifest, runs)
        set_guard(job, prepared.dataset)
        watch_over(job)
        look_on(job, getattr(prepared, "validation", None), signals, answer)
        with signals.saving():
            state = _run(job, signals)
            manifest = hand_over(job, state, tokenizer, prepared, parts, Scores(score, signals))
            signum = share_signal(signals)
    job.trainer.accelerator.free_memory()
    if signum:
        raise Interrupted(f"Stopped after stage {stage.name}, which is done. The same command continues.", signum)
    signals.check()
    return manifest


def _arguments(
    stage: Stage, paths: RunPaths, trained: dict[str, Any], resume: bool
) -> tuple[SFTConfig, Precision, int]:
    """How a stage is trained here: its arguments, what it computes in, and the rows of an optimizer step."""
    ranks = DataRanks.of(stage.train.sequence_parallel_size).count
    precision = decide(lambda: precision_of(stage, paths, resume=resume))
    share = decide(lambda: share_of(stage, paths.stage_dir(stage.name), trained, ranks, resume=resume))
    args = build_arguments(stage, paths, bf16=precision.bf16, share=share)
    if args.use_cpu:
        keep_freed_memory()
    return args, precision, share.rows * share.micro_batches * ranks


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


def _on_device(model: Any, args: SFTConfig) -> Any:
    """The model where it is trained, as far as it is there as a whole."""
    # Weights in 4 bits were loaded to where they are.
    there = args.use_cpu or is_four_bit(model) or (is_sharded(args) and not is_main())
    return model if there else model.to(args.device)


def _run(job: Job, signals: StopSignals) -> TrainerState:
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
                raise RestartError(
                    f"{checkpoint.path} holds weights alone, as those of a stage that is done: start the stage again "
                    f"with --restart {job.stage.name}."
                )
    with plain_errors(job), suppress(EndedAtOnce):
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint.path) if checkpoint else None)
        finally:
            job.progress.close()
            if trainer.watchdog is not None:
                trainer.watchdog.close()
            trainer.marking.finish()
    if signals.received is not None and not _ended(job, trainer.state):
        raise Interrupted(
            f"Stopped at step {trainer.state.global_step} of {trainer.state.max_steps} of stage {job.stage.name}, "
            "everything saved. The same command continues.",
            signals.received,
        )
    return trainer.state


def _ended(job: Job, state: TrainerState) -> bool:
    """Whether all steps are done, or all that the stage needs."""
    from sft.train.stopping import stopped_at

    return state.global_step >= state.max_steps or stopped_at(job.stage, state) is not None
