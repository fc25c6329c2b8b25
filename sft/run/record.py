"""What a run tells of itself: `recipe.yaml` as given, `resolved.yaml` as it ran, and `manifest.json`.

Written once a command has been let in: by the main process, under the run's lock, past every refusal. A stage that is
done is told with the settings that it was trained with, whatever a later command says of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sft.recipe import Recipe, RunPaths, resolved_yaml
from sft.recipe.load import output_dir_of
from sft.utils.distributed import is_main
from sft.utils.environment import environment
from sft.utils.errors import UsageError
from sft.utils.files import read_sealed, sha256_file, write_sealed, write_text

_STAGE = (
    "key",
    "steps",
    "stopped",
    "average",
    "best",
    "token_statistics",
    "epochs",
    "final_loss",
    "validation",
    "counters",
    "engine",
    "precision",
    "kernels",
    "world_size",
    "sequence_parallel_size",
    "files",
    "environment",
)
_DATA = ("key", "inputs", "rows", "documents", "packs", "tokens", "supervised_tokens", "funnel")
_RESULT = ("pass_at_1", "interval", "problems", "samples", "dtype")


def write_record(paths: RunPaths) -> None:
    """Bring the run's recipe and manifest up to date with what has been done; by the main process."""
    if not is_main():
        return
    ran = recipe_as_run(paths)
    given = paths.recipe.given
    if given.text:
        write_text(paths.given, given.text)
    write_text(paths.resolved, resolved_yaml(ran))
    write_sealed(
        paths.manifest,
        {
            "recipe": ran.name,
            "seed": ran.seed,
            "overrides": list(given.overrides),
            "resolved": sha256_file(paths.resolved),
            "environment": environment(),
            "stages": {stage.name: told for stage in ran.stages if (told := _stage(paths, stage.name))},
            "evaluations": {point: told for point in _points(ran) if (told := _evaluation(paths, point))},
        },
    )


def overrides_as_run(name: str, overrides: Sequence[str]) -> list[str]:
    """What the command line set when the recipe called `name` ran, where it ran in the folder that it means now, and
    its file says the same still; else nothing."""
    try:
        text, folder = output_dir_of(name, overrides)
    except UsageError:  # told, with its line, where the recipe is loaded
        return []
    if folder is None:
        return []
    paths = RunPaths(Recipe.model_construct(output_dir=folder, prepared_dir=None))
    record = read_sealed(paths.manifest)
    if record is None or not paths.given.is_file() or paths.given.read_text(encoding="utf-8") != text:
        return []
    return list(map(str, record.get("overrides") or ()))


def recipe_as_run(paths: RunPaths) -> Recipe:
    """The recipe with each stage that is done as it was trained; it is evaluated as the recipe says now."""
    stages = []
    for stage in paths.recipe.stages:
        trained = (read_sealed(paths.stage_manifest(stage.name)) or {}).get("recipe")
        now = stage.evaluate.model_dump()
        stages.append(type(stage).model_validate({**trained, "evaluate": now}) if trained else stage)
    return paths.recipe.model_copy(update={"stages": stages})


def _points(recipe: Recipe) -> list[str]:
    return ["start", *(stage.name for stage in recipe.stages)]


def _stage(paths: RunPaths, name: str) -> dict[str, Any]:
    found = read_sealed(paths.stage_manifest(name)) or {}
    data = found.get("data") or {}
    told = {key: found[key] for key in _STAGE if key in found}
    return told and {**told, "data": {key: data[key] for key in _DATA if key in data}}


def _evaluation(paths: RunPaths, point: str) -> dict[str, Any]:
    found = read_sealed(paths.eval_dir(point) / "manifest.json") or {}
    suites = found.get("metrics") or {}
    return {name: {key: suite.get(key) for key in _RESULT} for name, suite in suites.items()}
