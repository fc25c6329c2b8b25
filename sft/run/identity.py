"""What makes two trainings of a stage the same training: the parts of its key, by content, and the stages done."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sft.recipe.outcome_keys import HANDS_ON, hands_on, stops
from sft.train.checkpoints import describe_difference, read_marker
from sft.utils.errors import RestartError, UserError
from sft.utils.files import read_sealed, sha256_json
from sft.utils.hashes import folder_hashes

if TYPE_CHECKING:
    from sft.recipe.paths import RunPaths
    from sft.recipe.schema import Stage

FORMAT = 2
"""Raised when stages made by an older version must not be continued."""


def stage_parts(paths: RunPaths, stage: Stage, data_key: str) -> dict[str, Any]:
    """Everything the stage's weights follow from, as nested JSON values that can be compared part by part."""
    return {**settled_parts(paths, stage), "start": _start(paths, stage), "data": data_key}


def settled_parts(paths: RunPaths, stage: Stage) -> dict[str, Any]:
    """The parts that the recipe alone tells, before any data is prepared."""
    return {
        "format": FORMAT,
        "stage": stage.name,
        "seed": paths.recipe.seed,
        "train": stage.train.effective(),
        "stop_when": stops(stage),
        HANDS_ON: hands_on(stage),
        **({"load_in_4bit": True} if paths.recipe.model.load_in_4bit else {}),
    }


def stage_key(parts: dict[str, Any]) -> str:
    """The stage's key: a hash of its parts."""
    return sha256_json(parts)


def previous_stage(paths: RunPaths, stage: Stage) -> Stage | None:
    """The stage before `stage` in the recipe."""
    names = [other.name for other in paths.recipe.stages]
    index = names.index(stage.name)
    return paths.recipe.stages[index - 1] if index else None


def done_manifest(paths: RunPaths, stage: str) -> dict[str, Any] | None:
    """The manifest of a stage that is done and whose model is, byte for byte, what it made; else None.

    Raises UserError for a broken manifest, and for a model that is gone or isn't that stage's any more.
    """
    path, final = paths.stage_manifest(stage), paths.final_dir(stage)
    if not path.exists():
        return None
    manifest = read_sealed(path)
    if manifest is None or not {"key", "parts", "steps", "files"} <= manifest.keys():
        raise RestartError(f"{path} is broken: start the stage again with --restart {stage}.")
    if not final.is_dir():
        raise RestartError(f"Stage {stage} is done, but {final} is gone: use --restart {stage}.")
    wrong = describe_difference(manifest["files"], folder_hashes(final))
    if wrong:
        raise RestartError(
            f"{final} is not what stage {stage} made ({wrong.split(' was ')[0]} differs): put it back, or use "
            f"--restart {stage}."
        )
    return manifest


def trained_stages(paths: RunPaths) -> list[str]:
    """The stages that are done, in the recipe's order."""
    return [stage.name for stage in paths.recipe.stages if done_manifest(paths, stage.name) is not None]


def untrained_stages(paths: RunPaths) -> list[str]:
    """The stages that aren't done, in the recipe's order."""
    trained = trained_stages(paths)
    return [stage.name for stage in paths.recipe.stages if stage.name not in trained]


def check_done(paths: RunPaths, stage: Stage, parts: dict[str, Any], manifest: dict[str, Any]) -> None:
    """Raise UserError when a stage that is done was made with other settings than `parts`.

    Other averages of the same training are none, where they can be made again: from its checkpoints, before another
    stage stands on it.
    """
    before = {name: manifest["parts"].get(name) for name in parts}
    difference = describe_difference(before, parts)
    if is_only_handed_on_otherwise(parts, manifest):
        difference = _cannot_hand_on_again(paths, stage, manifest, difference)
    if difference:
        commit = (before.get("start") or {}).get("commit")
        moved = commit != (parts.get("start") or {}).get("commit")
        back = f"Set model.model_revision: {commit}" if commit and moved else "Put the recipe back"
        raise RestartError(
            f"Stage {stage.name} is done, but with other settings: {difference}. {back}, do it again with "
            f"--restart {stage.name}, or choose another output_dir."
        )


def is_only_handed_on_otherwise(parts: dict[str, Any], manifest: dict[str, Any]) -> bool:
    """Whether a stage that is done was trained as `parts` say, and is to hand on something else of that training."""
    before = {name: manifest["parts"].get(name) for name in parts}
    was = before.pop(HANDS_ON)
    trained = {key: value for key, value in parts.items() if key != HANDS_ON}
    return was != parts[HANDS_ON] and not describe_difference(before, trained)


def _cannot_hand_on_again(paths: RunPaths, stage: Stage, manifest: dict[str, Any], difference: str) -> str:
    """Why a stage's result can't be made again from its checkpoints; empty where it can."""
    names = [other.name for other in paths.recipe.stages]
    later = [name for name in names[names.index(stage.name) + 1 :] if paths.stage_manifest(name).exists()]
    if later:
        return f"{difference} (and stage {later[0]} was trained from what it handed on)"
    last = f"checkpoint-{manifest['steps']}"
    if read_marker(paths.stage_dir(stage.name) / last) is None:
        return f"{difference} (and {last}, to make it from, is gone or damaged)"
    return ""


def check_all_done(paths: RunPaths, look: Callable[[RunPaths, str], dict[str, Any] | None] = done_manifest) -> None:
    """Refuse a recipe that says something else of a stage that is done, whichever stage the command is about.

    `look` finds a stage's manifest; the default compares the model's files with it, too.
    """
    for stage in paths.recipe.stages:
        manifest = look(paths, stage.name)
        if manifest is not None:
            check_done(paths, stage, settled_parts(paths, stage), manifest)


def point_identity(paths: RunPaths, stage: str | None) -> dict[str, Any]:
    """What the model and tokenizer after `stage` (None: at the start) are known by."""
    if stage is None:
        return {"start": _run_start(paths)}
    manifest = done_manifest(paths, stage)
    if manifest is None:
        raise UserError(f"Stage {stage} isn't done: run `sft train --stage {stage}` first.")
    return {"key": manifest["key"], "files": manifest["files"]}


def _start(paths: RunPaths, stage: Stage) -> dict[str, Any]:
    before = previous_stage(paths, stage)
    if before is None:
        return _run_start(paths)
    if done_manifest(paths, before.name) is None:
        raise UserError(f"Stage {stage.name} starts from stage {before.name}, which isn't done: train that first.")
    return {"stage": before.name, **point_identity(paths, before.name)}


def _run_start(paths: RunPaths) -> dict[str, Any]:
    # What has been trained is told without torch, which takes seconds to import.
    from sft.models.identity import start_identity

    return start_identity(paths.recipe)
