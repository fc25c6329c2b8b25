"""What a command would do with a recipe, and what of it is done already: told without reading data or a model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sft.recipe.paths import RunPaths
from sft.recipe.source_names import source_name
from sft.run.checks import ALL
from sft.run.identity import check_all_done
from sft.run.publish import push_obstacle
from sft.run.restart import is_under_way
from sft.utils.distributed import world_size
from sft.utils.files import read_sealed
from sft.utils.tables import counted

if TYPE_CHECKING:
    from pathlib import Path

    from sft.recipe.outcome_keys import StopSection
    from sft.recipe.schema import DataSource, EvaluateSection, Recipe, Stage, SuiteSection
    from sft.recipe.steps import StepEntry


def outlook(
    recipe: Recipe,
    only: str | None = None,
    parts: Sequence[str] = ALL,
    *,
    restart: str | None = None,
    processes: int | None = None,
) -> Iterator[str]:
    """Lines for people: the start, each stage, and what comes after them.

    Args:
        only: of the stage of this name alone.
        parts: what of it will be done: `data`, `training`, `suites`; what comes after all stages is told with all.
        restart: this stage and the later ones are thrown away first, unless that was done by the same command.
        processes: that will train; default: those there are.

    Raises UserError for a stage that is done with other settings, as the run would.
    """
    paths, model = RunPaths(recipe), recipe.model
    names = [stage.name for stage in recipe.stages]
    again = names[names.index(restart) :] if restart and not is_under_way(paths, restart) else []
    if "training" in parts:
        check_all_done(paths, lambda paths, name: None if name in again else read_sealed(paths.stage_manifest(name)))
    start = model.model_name_or_path or "random weights"
    stages = counted(len(recipe.stages), "stage")
    rows_alone = f"{recipe.name}: rows of {stages}, kept in {paths.prepared}"
    yield f"{recipe.name}: {stages} in {paths.root}, from {start}" if "training" in parts else rows_alone
    for number, stage in enumerate(recipe.stages, start=1):
        if only in (None, stage.name):
            world = processes or world_size()
            yield from _stage(paths, number, stage, parts, again=stage.name in again, processes=world)
    others = [stage.name for stage in recipe.stages if stage.name != only]
    if set(ALL) <= set(parts) and (only is None or all(paths.stage_manifest(name).exists() for name in others)):
        target = recipe.push.repo_id
        seen = "private" if recipe.push.private else "public"
        yield f"then: export to {paths.export}, {f'push to {target} ({seen})' if target else 'no push'}, report"
        if target and (obstacle := push_obstacle(target, publish=seen == "public")):
            yield f"   now the push would be refused: {obstacle}"


def _stage(
    paths: RunPaths, number: int, stage: Stage, parts: Sequence[str], *, again: bool, processes: int
) -> Iterator[str]:
    state = "to do again" if again else stage_state(paths, stage)
    yield f"{number}. {stage.name}{f': {state}' if 'training' in parts else ''}"
    yield f"   sources: {', '.join(_sources(stage.data.sources))}"
    if stage.data.steps:
        yield f"   then all: {' > '.join(entry.name for entry in stage.data.steps)}"
    if "training" in parts:
        yield f"   training: {_training(stage, processes)}"
    if stage.data.validation is not None:
        yield f"   held out: {_held_out(stage, losses='training' in parts)}"
    if "training" in parts and (told := _outcome(stage)):
        yield f"   {told}"
    if "training" in parts and stage.evaluate.every is not None:
        yield f"   suites while it trains: {_while_training(stage.evaluate)}"
    points = (["start"] if number == 1 and stage.evaluate.before_first_stage else []) + [stage.name]
    for suite in stage.evaluate.suites if "suites" in parts else ():
        done = [point for point in points if answered_in(paths.eval_dir(point), suite)]
        told = f", done at {' and '.join(done)}" if done else ""
        yield f"   suite: {suite.name} at {' and '.join(points)}{told}"


def _while_training(section: EvaluateSection) -> str:
    every, suites = section.every, section.while_training()
    assert every is not None
    when = counted(every.steps, "step") if every.steps is not None else f"{every.tokens:,} tokens"
    cut = f", the first {counted(every.max_problems, 'problem')} of each" if every.max_problems is not None else ""
    return f"{', '.join(suite.name for suite in suites)}, after each {when}{cut}"


def answered_in(folder: Path, suite: SuiteSection) -> bool:
    """Whether there are results of a suite in a point's folder."""
    return (folder / suite.name / "metrics.json").is_file()


def stage_state(paths: RunPaths, stage: Stage) -> str:
    """Whether a stage is done, under way or to do."""
    manifest = read_sealed(paths.stage_manifest(stage.name))
    if manifest is not None:
        return f"done already ({manifest.get('steps')} steps)"
    names = [path.name for path in paths.stage_dir(stage.name).glob("checkpoint-*")]
    steps = [int(name.removeprefix("checkpoint-")) for name in names if re.fullmatch(r"checkpoint-\d+", name)]
    return f"under way, saved at step {max(steps)}" if steps else "to do"


def _sources(sources: Sequence[DataSource]) -> list[str]:
    return [f"{source_name(source)}{_rows(source)}{_steps(source.steps)}" for source in sources]


def _rows(source: DataSource) -> str:
    if source.sources is not None:
        return f" ({', '.join(_sources(source.sources))})"
    rows = source.generate.rows if source.generate is not None else source.max_rows
    return f" ({rows:,} rows)" if rows is not None else ""


def _steps(steps: Sequence[StepEntry]) -> str:
    return "".join(f" > {entry.name}" for entry in steps)


def _training(stage: Stage, processes: int) -> str:
    train = stage.train
    together = train.sequence_parallel_size
    batch = (train.per_device_train_batch_size, train.gradient_accumulation_steps, processes // together)
    of = f" of up to {train.max_length:,} tokens" if train.max_length is not None else ""
    epochs = "1 epoch" if train.num_train_epochs == 1 else f"{train.num_train_epochs:g} epochs"
    long = counted(train.max_steps, "step") if train.max_steps > 0 else epochs
    what = f"LoRA of rank {train.lora_r}" if train.use_peft else "all weights"
    several = f"{counted(batch[2], 'group')} of {together} processes"
    of_them = counted(batch[2], "process", "processes") if together == 1 else several
    made_of = f"{batch[0]} a {'process' if together == 1 else 'group'} x {batch[1]} accumulated x {of_them}"
    rows = counted(batch[0] * batch[1] * batch[2], "pack" if train.packing else "row")
    return f"{what}, {long}, {_engine(stage, processes)}effective batch {rows}{of} ({made_of})"


def _engine(stage: Stage, processes: int) -> str:
    given = stage.train.deepspeed
    if given is None:
        return "DDP, " if processes > 1 else ""
    return f"DeepSpeed {given if isinstance(given, str) else 'as the recipe has it'}, "


def _outcome(stage: Stage) -> str:
    """What ends the stage early, and what it hands on in place of its last step's weights."""
    told: list[str] = []
    average, train = stage.average, stage.train
    if stage.stop_when is not None:
        told += _ends(stage.stop_when)
    if stage.keep_best is not None:
        kept = "all" if train.save_total_limit is None else f"the last {train.save_total_limit}"
        told.append(f"hands on the best of {kept} checkpoints on {stage.keep_best}")
    parts = [f"the last {average.last} checkpoints"] if average and average.last else []
    parts += [f"checkpoints {', '.join(map(str, average.steps()))}"] if average and average.checkpoints else []
    parts += [f"weights at a decay of {train.ema.decay:g}"] if train.ema else []
    if average and average.with_start:
        parts = parts or ["its last weights"]
        parts[-1] += f" ({average.weight:g})"
        parts.append(f"its start ({1 - (average.weight or 0):g})")
    if parts:
        told.append(f"hands on an average: {' and '.join(parts)}")
    return ", ".join(told)


def _ends(when: StopSection) -> Iterator[str]:
    if when.token_accuracy is not None:
        yield f"ends at a token accuracy of {when.token_accuracy:g}"
    if when.patience is not None:
        evaluations = counted(when.patience, "evaluation")
        yield f"ends once {when.metric} has got no better for {evaluations}"


def _held_out(stage: Stage, *, losses: bool) -> str:
    held, train = stage.data.validation, stage.train
    assert held is not None
    rows = f"{held.size:g} of the rows" if held.size is not None else ", ".join(_sources(held.sources or []))
    if not losses:
        return rows
    every = train.logging_steps if train.eval_steps is None else train.eval_steps
    between = {"no": "", "epoch": ", after each epoch", "steps": f", each {every:g} steps"}[train.eval_strategy]
    return f"{rows}; their loss before training{between} and at the end"
