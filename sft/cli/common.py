"""What the verbs share: the recipe's options, the stages meant, quiet libraries, the terminal."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from sft.errors import UserError
from sft.files import write_text
from sft.recipe import Recipe, RunLayout, Stage, load_recipe, resolved_yaml

if TYPE_CHECKING:
    from rich.console import Console


def add_recipe_arguments(parser: argparse.ArgumentParser, *, stage: bool = True) -> None:
    """`--config`, `--stage` and `--dry_run`."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe file, or a name from `sft recipes`")
    if stage:
        parser.add_argument("--stage", metavar="NAME", help="this stage alone")
    parser.add_argument("--dry_run", action="store_true", help="check the recipe, write it out resolved, and exit")


def recipe_of(arguments: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe that the command line means; its --stage is checked too. Raises UsageError."""
    recipe = load_recipe(arguments.config, overrides)
    if getattr(arguments, "stage", None):
        recipe.stage(arguments.stage)
    return recipe


def dry_run(recipe: Recipe) -> int:
    """Write the resolved recipe and say where."""
    layout = RunLayout(recipe)
    write_text(layout.resolved, resolved_yaml(recipe))
    print(layout.resolved)
    return 0


def stages_of(recipe: Recipe, arguments: argparse.Namespace) -> list[Stage]:
    """The stage that --stage names, or all."""
    return [recipe.stage(arguments.stage)] if arguments.stage else recipe.stages


def last_trained(recipe: Recipe, stage: str | None = None) -> Path:
    """The final folder of `stage`, or of the last stage that has been trained. Raises UserError when there is none."""
    layout = RunLayout(recipe)
    names = [stage] if stage else [entry.name for entry in reversed(recipe.stages)]
    for name in names:
        if layout.stage_manifest(name).is_file():
            return layout.final_dir(name)
    what = f"stage {stage} of {recipe.name} isn't trained" if stage else f"no stage of {recipe.name} is trained"
    raise UserError(f"{what} in {layout.root}; run `sft run` or `sft train` with this recipe first")


def console() -> Console:
    """Where tables and progress go: the terminal, or plain lines when it isn't one."""
    from rich.console import Console

    return Console(highlight=False, soft_wrap=True)


def quiet_libraries() -> None:
    """Keep the libraries' start-up chatter off the terminal. Call before the first heavy import."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("DS_LOG_LEVEL", "error")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("DeepSpeed", "torch.distributed.elastic", "absl", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
