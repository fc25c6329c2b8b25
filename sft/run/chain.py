"""The chain of stages: prepare, evaluate the start, then train and evaluate each stage; what is done is skipped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sft.models.positions import check_positions
from sft.recipe.paths import RunPaths
from sft.run.checks import ALL, check_recipe
from sft.run.evaluation import evaluate_live, evaluate_point, read_live_problems, score_checkpoint
from sft.run.identity import check_all_done, check_done, done_manifest, is_only_handed_on_otherwise, stage_parts
from sft.run.lock import lock_for_all
from sft.run.record import write_record
from sft.run.restart import begun_anew
from sft.run.sharing import take_stage
from sft.run.start import starting_point
from sft.tokenizers.load import start_tokenizer
from sft.tokenizers.vocabulary import check_vocabulary
from sft.train.arguments import check_arguments
from sft.train.interrupt import stop_signals
from sft.train.stage import train_stage
from sft.utils.distributed import alike, check_shared_folder, decide, is_main
from sft.utils.memory import quick_collections
from sft.utils.progress import PhaseLines
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.data.prepare import PreparedStage
    from sft.recipe.schema import Recipe, Stage


def run(
    recipe: Recipe,
    *,
    only_stage: str | None = None,
    restart: str | None = None,
    evaluate: bool = True,
    others: Sequence[RunPaths] = (),
) -> dict[str, Any]:
    """Prepare, train and evaluate the recipe's stages in order; give the same call again to continue after a stop.

    `only_stage`: just this one (the stages before it must be done). `restart`: throw away what this stage and all later
    ones have made, and do them again; after a stop the same call goes on, until `restart.is_over`. `others`: runs whose
    stages and evaluations are taken over where they are, by content, the same. Returns {"stages": manifests by name,
    "evaluations": metrics by point}.
    Raises UserError when a stage is done or under way with another recipe: nothing is overwritten unasked, and the
    run's own record is written past all refusals alone.
    """
    paths = RunPaths(recipe)
    for name in (only_stage, restart):
        if name:
            recipe.stage(name)
    parts = ALL if evaluate else ("data", "training")
    decide(lambda: check_recipe(recipe, parts, stage=only_stage))
    busy = f"Another run is at work in {paths.root}: wait for it, or set another output_dir."
    with stop_signals() as signals, lock_for_all(paths.root / ".lock", busy), quick_collections():
        check_shared_folder(paths.root)
        for stage in recipe.stages if not is_main() else ():
            check_arguments(stage)  # another node may lack what the first one has
        with begun_anew(paths, restart):
            decide(lambda: check_all_done(paths))
            result: dict[str, Any] = {"stages": {}, "evaluations": {}}
            if evaluate and not only_stage and recipe.stages[0].evaluate.before_first_stage:
                result["evaluations"]["start"] = evaluate_point(paths, None, others)
            for stage in recipe.stages:
                signals.check()
                if only_stage in (None, stage.name):
                    result["stages"][stage.name] = _one_stage(paths, stage, others)
                    signals.check()
                    if evaluate:
                        result["evaluations"][stage.name] = evaluate_point(paths, stage.name, others)
            write_record(paths)
    return result


def train(recipe: Recipe, *, only_stage: str | None = None, restart: str | None = None) -> dict[str, Any]:
    """The same as run(), without evaluations."""
    return run(recipe, only_stage=only_stage, restart=restart, evaluate=False)


@dataclass(frozen=True)
class _Plan:
    """What the main process has found out of a stage, for all processes."""

    parts: dict[str, Any]
    prepared: PreparedStage
    done: dict[str, Any] | None


def _one_stage(paths: RunPaths, stage: Stage, others: Sequence[RunPaths]) -> dict[str, Any]:
    """Prepare and train one stage unless it is done."""
    plan: _Plan = decide(lambda: _plan(paths, stage, others))
    if plan.done is not None:
        say(f"{stage.name}: done already ({plan.done['steps']} steps), skipped")
        return plan.done
    check_shared_folder(plan.prepared.path)
    decide(lambda: read_live_problems(stage))
    point = starting_point(paths, stage)
    with alike():
        check_vocabulary(point.model, plan.prepared.largest_id)
        check_positions(point.model, plan.prepared.manifest["max_document_length"])
    return train_stage(
        paths.recipe,
        stage,
        model=point.model,
        tokenizer=point.tokenizer,
        prepared=plan.prepared,
        paths=paths,
        parts=plan.parts,
        base=point.base,
        started=lambda: write_record(paths),
        score=lambda folder, step: score_checkpoint(paths, stage, folder, step),
        answer=lambda model, step, check: evaluate_live(paths, stage, (model, point.tokenizer), step, check),
    )


def _plan(paths: RunPaths, stage: Stage, others: Sequence[RunPaths]) -> _Plan:
    from sft.data.prepare import prepare_stage

    # The stages hand the tokenizer on unchanged, so the rows of all are made with the one that the run starts with.
    tokenizer = start_tokenizer(paths.recipe.model)
    prepared = prepare_stage(paths.recipe, stage, tokenizer, progress=PhaseLines(stage.name))
    parts, done = stage_parts(paths, stage, prepared.manifest["key"]), done_manifest(paths, stage.name)
    if done is None:
        done = take_stage(paths, stage, parts, others)
    else:
        check_done(paths, stage, parts, done)
        if is_only_handed_on_otherwise(parts, done):
            say(f"{stage.name}: trained already ({done['steps']} steps), handed on anew from its checkpoints")
            done = None
    return _Plan(parts, prepared, done)
