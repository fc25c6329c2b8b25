"""What a stage hands on when its steps are done: the weights of its last or best step, and its manifest."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.models.lora import lora_settings
from sft.train.checkpoints import (
    keep_weights_only,
)
from sft.train.engine import switched_as_outside, whole_weights
from sft.train.interrupt import Interrupted, StopSignals
from sft.train.job import Job, plain_errors
from sft.utils.distributed import decide, is_main
from sft.utils.files import remove_file, sha256_file, sha256_json, write_sealed
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerState

    from sft.models.average import Average
    from sft.train.trainer import SambayTrainer


@dataclass
class Scores:
    """How checkpoints are compared, and the signals that end that."""

    score: Callable[[Path, int], float] | None
    signals: StopSignals

    def best(self, job: Job, end: int, save: Callable[[Path, Average], None]) -> dict[str, Any]:
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


def hand_over(
    job: Job,
    state: TrainerState,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    parts: dict[str, Any],
    scores: Scores,
) -> dict[str, Any]:
    """Write `final/`, then the manifest that declares the stage done."""
    from sft.models.average import Average
    from sft.train.callbacks import write_metrics

    trainer, paths, name = job.trainer, job.paths, job.stage.name
    manifest = _manifest(job, state, prepared, parts)
    trainer.check_finite()
    trainer.restore_config()
    weights = whole_weights(trainer)
    if trainer.ema is not None and is_main():
        trained = trainer.model.state_dict() if weights is None else weights
        # What is averaged with the start is rounded then, and not before too.
        mixed = job.stage.average is not None and job.stage.average.with_start
        weights = trainer.ema.weights(trained, rounded=not mixed)
    if job.stage.keep_best:
        with plain_errors(job):
            manifest["best"] = scores.best(
                job, state.global_step, lambda to, one: job.save(to, tokenizer, weights, one)
            )

    def save() -> None:
        with plain_errors(job):
            average = job.outcome.average(state.global_step)
            if job.stage.keep_best:
                average = Average([job.outcome.checkpoint(manifest["best"]["step"])])
            manifest["average"] = job.outcome.parents or None
            # What was handed on before, if the stage is handed on anew: it isn't done until that is whole.
            remove_file(paths.stage_manifest(name))
            job.save(paths.final_dir(name), tokenizer, weights, average)

    def declare() -> dict[str, Any]:
        with plain_errors(job):
            write_metrics(paths.metrics(name), state.log_history)
            manifest["metrics"] = sha256_file(paths.metrics(name))
            manifest["files"] = folder_hashes(paths.final_dir(name))
            write_sealed(paths.stage_manifest(name), manifest)
            job.outcome.forget_start()
            if not job.stage.train.keep_optimizer:
                keep_weights_only(paths.stage_dir(name))
        return manifest

    decide(save)
    manifest["validation"] = _validation(job, getattr(prepared, "validation", None), state, manifest.get("best"))
    return decide(declare)


def _manifest(job: Job, state: TrainerState, prepared: Any, parts: dict[str, Any]) -> dict[str, Any]:
    """What is told of a stage that is trained, but for what it hands on."""
    from sft.train.stopping import stopped_at
    from sft.utils.environment import environment

    trainer = job.trainer
    return {
        "key": sha256_json(parts),
        "parts": parts,
        "stage": job.stage.name,
        "recipe": job.stage.model_dump(),
        "train": job.stage.train.complete(cuda=not trainer.args.use_cpu, bf16=job.engine["precision"] == "bfloat16"),
        "steps": state.global_step,
        "stopped": stopped_at(job.stage, state) if state.global_step < state.max_steps else None,
        "epochs": state.epoch,
        "counters": {key: round(value, 3) for key, value in trainer.counters.items()},
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


def _left_out(trainer: SambayTrainer) -> dict[str, Any] | None:
    """The steps that the guard left out, and its returns to checkpoints; None where there are none."""
    if trainer.guarded is None or not trainer.guarded.guard.skipped:
        return None
    guard = trainer.guarded.guard
    return {"steps": [line["step"] for line in guard.skipped], "returns": guard.rolled_back}


def _validation(job: Job, held: Any, state: TrainerState, best: dict[str, Any] | None) -> dict[str, Any] | None:
    """What is told of the held-out rows (a PreparedStage): how many, and their loss before training, of what is handed
    on (`loss_at_end`), and after the last step. On all processes, once `final/` is there; `best`: the best checkpoint.
    """
    if held is None:
        return None
    looks = [(log["step"], log["eval_loss"]) for log in state.log_history if "eval_loss" in log]
    losses = [loss for _, loss in looks]
    handed_on = losses[-1]
    if best is not None:
        handed_on = dict(looks).get(best["step"], handed_on)
    elif job.stage.average is not None or job.stage.train.ema is not None:
        assert job.validation is not None
        handed_on = job.validation.of_final(job.paths.final_dir(job.stage.name))
    told = {key: held.manifest[key] for key in ("key", "documents", "tokens", "supervised_tokens")}
    told |= {"loss_at_start": losses[0], "loss_at_end": handed_on, "lowest_loss": min(losses)}
    return told if handed_on == losses[-1] else {**told, "loss_of_last_step": losses[-1]}
