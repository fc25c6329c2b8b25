"""What a command would make of a run's models: answers to suites, an export, a push, a report; told without a model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sft.recipe.suites import Chosen
from sft.run.identity import trained_stages, untrained_stages
from sft.run.outlook import answered_in
from sft.run.publish import export_is_current, push_obstacle, taken_stage
from sft.utils.errors import UserError
from sft.utils.files import unwritable
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import EvaluateSection, SuiteSection


def eval_outlook(
    paths: RunPaths,
    *,
    start: bool = False,
    model: str | None = None,
    stage: str | None = None,
    chosen: Chosen | None = None,
) -> Iterator[str]:
    """Which model would be asked what."""
    stages, chosen = paths.recipe.stages, chosen or Chosen()
    if model is not None:
        owner = paths.recipe.stage(stage) if stage else stages[-1]
        yield from suites_outlook(chosen.of(owner.evaluate), f"the model {model}")
    elif start:
        there = paths.eval_dir(f"start{chosen.label}")
        yield from suites_outlook(chosen.of(stages[0].evaluate), "the start, before training", there)
    else:
        missing = untrained_stages(paths)
        for one in [paths.recipe.stage(stage)] if stage else stages:
            if one.name in missing:
                yield f"eval: nothing after stage {one.name}, which isn't trained yet"
            else:
                there = paths.eval_dir(f"{one.name}{chosen.label}")
                yield from suites_outlook(chosen.of(one.evaluate), f"the model after stage {one.name}", there)


def suites_outlook(section: EvaluateSection, model: str, there: Path | None = None) -> Iterator[str]:
    """What a model would be asked; `there`: where the answers go, if that is known."""
    yield f"eval: {model}{'' if section.suites else ': no suites'}"
    for suite in section.suites:
        done = ", answered already" if there is not None and answered_in(there, suite) else ""
        each = counted(suite.samples_per_problem, "answer")
        yield f"   suite: {suite.name}: {_problems(suite)} x {each}, {_how(suite)}{done}"


def _problems(suite: SuiteSection) -> str:
    """How many problems, as far as no file is read for it, and where they are from."""
    generated, source = suite.source.generate, suite.source
    counts = [suite.max_problems, source.max_rows, None if generated is None else generated.rows]
    most = min((count for count in counts if count is not None), default=None)
    number = "all problems" if most is None else f"{'' if generated else 'at most '}{counted(most, 'problem')}"
    return f"{number} of {f'generate:{generated.family}' if generated else source.path}"


def _how(suite: SuiteSection) -> str:
    drawn = f"temperature {suite.temperature:g}" if suite.temperature else "greedy"
    if suite.max_length is not None:
        return f"{drawn}, up to {counted(suite.max_length, 'token')} with the prompt"
    return f"{drawn}, up to {counted(suite.max_new_tokens, 'token')}"


def export_outlook(
    paths: RunPaths, *, stage: str | None = None, out: Path | None = None, dtype: str | None = None
) -> Iterator[str]:
    """Which model would be written where, and in what type."""
    folder = out or paths.export
    yield f"export: {_taken(paths, stage)}"
    yield f"   folder: {folder}{' (the one that is there is replaced)' if folder.exists() else ''}"
    yield f"   weights: {_weights(paths, dtype)}"
    yield from _closed(folder.parent)


def _closed(folder: Path) -> Iterator[str]:
    """That a folder can't be written to, if so."""
    if why := unwritable(folder):
        yield f"   now it would be refused: {folder} can't be written to ({why})"


def _taken(paths: RunPaths, stage: str | None) -> str:
    """Which stage's model, and what isn't trained."""
    try:
        name, missing = taken_stage(paths, stage), untrained_stages(paths)
    except UserError as error:
        return f"nothing yet: {error}"
    return f"the model after stage {name}{' (not trained yet: ' + ', '.join(missing) + ')' if missing else ''}"


def _weights(paths: RunPaths, dtype: str | None = None) -> str:
    adapters = any(stage.train.use_peft for stage in paths.recipe.stages)
    merged = "adapters merged" if paths.recipe.push.merge_lora else "adapters as they are, on their base model"
    return f"{dtype or paths.recipe.model.dtype}{f', {merged}' if adapters else ''}"


def push_outlook(
    paths: RunPaths,
    *,
    folder: Path | None = None,
    repo_id: str | None = None,
    public: bool = False,
    revision: str | None = None,
    replace_card: bool = False,
) -> Iterator[str]:
    """What would go where, and who would see it."""
    section = paths.recipe.push
    target = repo_id or section.repo_id
    seen = "private" if section.private and not public else "public"
    where = target or "nowhere yet (--repo_id my-name/my-model says where)"
    yield f"push: to {where}, branch {revision or 'main'}, {seen}"
    if target and (obstacle := push_obstacle(target, publish=seen == "public")):
        yield f"   now it would be refused: {obstacle}"
    yield from _files(paths, folder)
    cards = "the export's" if replace_card else "the export's, but one that was edited on the Hub stays there"
    yield f"   README.md (the card) and LICENSE: {cards}"
    yield "   then: downloaded again, compared file by file, and run in a clean process"


def _files(paths: RunPaths, folder: Path | None) -> Iterator[str]:
    """The model, and the files that stand for it, or what they will be made from."""
    from sft.hub.folder import MANIFEST, is_export, read_manifest

    if folder is None:
        yield f"   model: {_taken(paths, None)}"
        if not trained_stages(paths):
            return
        yield f"   weights: {_weights(paths)}"
        if not export_is_current(paths):
            made = "weights, configuration, tokenizer, recipe, card, licence; a SambaY's code"
            yield f"   files: exported to {paths.export} first: {made}"
            return
    where = folder or paths.export
    if not is_export(where):
        yield f"   files: none: {where} is not a folder that `sft export` wrote"
        return
    promised = read_manifest(where)["files"]
    size, names = sum(file.get("size", 0) for file in promised.values()), sorted([*promised, MANIFEST])
    yield f"   files: {len(names)} in {where}, {size / 1e6:.1f} MB: {', '.join(names)}"
    if (where / "LICENSE").is_file():
        yield f"   licence: {(where / 'LICENSE').read_text(encoding='utf-8').partition(chr(10))[0]}"


def report_outlook(paths: RunPaths) -> Iterator[str]:
    """Which page would be written, from what."""
    missing = untrained_stages(paths)
    states = [f"{one.name} {'not trained' if one.name in missing else 'trained'}" for one in paths.recipe.stages]
    yield f"report: {paths.report / 'index.html'}, from what is in {paths.root}: {', '.join(states)}"
    yield from _closed(paths.report)
