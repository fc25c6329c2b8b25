"""What `import sft` offers: a recipe's verbs as functions, without a command line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft.recipe import Recipe, RunPaths
from sft.run import chain
from sft.run.checks import check_recipe
from sft.run.evaluation import evaluate_points
from sft.run.publish import export_stage
from sft.run.restart import is_over
from sft.utils.distributed import is_launched
from sft.utils.errors import UsageError

if TYPE_CHECKING:
    from sft.data.prepare import PreparedStage


def prepare(recipe: Recipe, *, stage: str | None = None, engine: str = "local") -> dict[str, PreparedStage]:
    """The prepared rows of `stage`, or of every stage, by name; made where they aren't there yet.

    `engine`: "local" or "ray". Raises UserError for data that can't be used.
    """
    from sft.data.prepare import prepare_stage
    from sft.tokenizers.load import start_tokenizer

    check_recipe(recipe, ("data",), stage=stage)
    tokenizer = start_tokenizer(recipe.model)
    stages = [recipe.stage(stage)] if stage else recipe.stages
    return {found.name: prepare_stage(recipe, found, tokenizer, engine=engine) for found in stages}


def run(
    recipe: Recipe, *, stage: str | None = None, restart: str | None = None, evaluate: bool = True
) -> dict[str, Any]:
    """Prepare, train and evaluate the stages (or `stage` alone); what is done is skipped, what was stopped goes on.

    `restart`: throw away what this stage and the later ones have made first; once, where the call is given again after
    a stop. Returns {"stages": manifests by name, "evaluations": metrics by point and suite}. Raises UserError where
    nothing may be overwritten, UsageError where the environment tells of other processes, which nobody here starts.
    """
    _check_alone()
    result = chain.run(recipe, only_stage=stage, restart=restart, evaluate=evaluate)
    is_over(RunPaths(recipe))
    return result


def evaluate(recipe: Recipe, *, stage: str | None = None, start: bool = False) -> dict[str, dict[str, Any]]:
    """Metrics by point and suite of the model after `stage`, of every trained stage, or with `start` of the start.

    Raises UsageError where the environment tells of other processes, which nobody here starts.
    """
    _check_alone()
    return evaluate_points(RunPaths(recipe), start=start, stage=stage)


def export(
    recipe: Recipe,
    *,
    stage: str | None = None,
    out: str | Path | None = None,
    dtype: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the folder that goes to the Hub, of `stage` or of the last stage trained; see `sft.hub.export.export`."""
    folder = None if out is None else Path(out)
    return export_stage(RunPaths(recipe), stage=stage, out=folder, dtype=dtype, progress=progress)


def _check_alone() -> None:
    """A node's variables are for `sft` to start processes by: here each node would take all work for its own."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1" and not is_launched():
        raise UsageError(
            f"WORLD_SIZE is {world}, and LOCAL_RANK isn't set: start this by torchrun, or unset WORLD_SIZE"
        )
