"""What the verbs share: the recipe's options, the stages meant, quiet libraries, tables and progress."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from sft.recipe import Recipe, RunPaths, Stage, environment, load_recipe, resolved_yaml
from sft.utils.errors import UserError
from sft.utils.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from rich.console import Console

    from sft.data.prepare import PreparedStage


def add_recipe_arguments(parser: argparse.ArgumentParser, *, stage: bool = True) -> None:
    """`--config`, `--stage` and `--dry_run`."""
    parser.add_argument("--config", required=True, metavar="RECIPE", help="recipe file, or a name from `sft recipes`")
    if stage:
        parser.add_argument("--stage", metavar="NAME", help="this stage alone")
    parser.add_argument("--dry_run", action="store_true", help="check the recipe, write it out resolved, and exit")


def add_restart_argument(parser: argparse.ArgumentParser) -> None:
    """`--restart`."""
    text = "throw away what this stage and the later ones have made, and do them again"
    parser.add_argument("--restart", metavar="STAGE", help=text)


def positive(text: str) -> int:
    """An option's whole number above zero."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


# ---- the recipe ----


def recipe_of(arguments: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The recipe that the command line means; its --stage and --restart are checked too. Raises UsageError."""
    recipe = load_recipe(arguments.config, overrides)
    for option in ("stage", "restart"):
        if getattr(arguments, option, None):
            recipe.stage(getattr(arguments, option))
    return recipe


def dry_run(recipe: Recipe) -> int:
    """Write the resolved recipe and say where. The one that a run was trained with is never overwritten."""
    layout, text = RunPaths(recipe), resolved_yaml(recipe)
    path = layout.resolved
    if _trained(layout) and not (path.is_file() and path.read_text(encoding="utf-8") == text):
        path = path.with_name("resolved.dry_run.yaml")
    write_text(path, text)
    print(path)
    return 0


def start_run(recipe: Recipe) -> RunPaths:
    """Leave the resolved recipe and what it runs with in the run's folder, from one process.

    Where stages are trained already this waits for `finish_run`: what is there may be refused as another recipe's.
    """
    layout = RunPaths(recipe)
    if os.environ.get("RANK", "0") == "0" and not _trained(layout):
        _write_run(layout)
    return layout


def finish_run(layout: RunPaths) -> None:
    """Bring the run's recipe and manifest up to date with what has been done."""
    _write_run(layout)


def _trained(layout: RunPaths) -> bool:
    return any(layout.stage_manifest(stage.name).is_file() for stage in layout.recipe.stages)


def _write_run(layout: RunPaths) -> None:
    """`resolved.yaml` and `manifest.json`: versions and commit, seed, and each stage's data, counts and results."""
    recipe = layout.recipe
    stages, evaluations = {}, {}
    for stage in recipe.stages:
        if layout.stage_manifest(stage.name).is_file():
            found = read_json(layout.stage_manifest(stage.name))
            stages[stage.name] = {key: found.get(key) for key in ("key", "steps", "epochs", "final_loss", "counters")}
            data = found.get("data") or {}
            kept = ("key", "inputs", "rows", "documents", "packs", "tokens", "supervised_tokens", "funnel")
            stages[stage.name]["data"] = {key: data[key] for key in kept if key in data}
    for point in ("start", *(stage.name for stage in recipe.stages)):
        marker = layout.eval_dir(point) / "manifest.json"
        if marker.is_file():
            suites = read_json(marker)["metrics"]
            numbers = ("pass_at_1", "interval", "problems", "samples")
            evaluations[point] = {name: {key: suite.get(key) for key in numbers} for name, suite in suites.items()}
    manifest = {"recipe": recipe.name, "seed": recipe.seed, "environment": environment()}
    write_text(layout.resolved, resolved_yaml(recipe))
    write_json(layout.manifest, {**manifest, "stages": stages, "evaluations": evaluations})


def stages_of(recipe: Recipe, arguments: argparse.Namespace) -> list[Stage]:
    """The stage that --stage names, or all."""
    return [recipe.stage(arguments.stage)] if arguments.stage else recipe.stages


def last_trained(recipe: Recipe) -> str:
    """The last stage that has been trained. Raises UserError when there is none."""
    layout = RunPaths(recipe)
    for stage in reversed(recipe.stages):
        if layout.stage_manifest(stage.name).is_file():
            return stage.name
    raise UserError(f"no stage of {recipe.name} is trained in {layout.root}; run `sft run` with this recipe first")


# ---- models and data ----


def starting_tokenizer(recipe: Recipe) -> Any:
    """The tokenizer that the run starts with; the stages hand it on unchanged."""
    from sft.tokenizers.load import load_tokenizer

    section = recipe.model
    if section.tokenizer:
        return load_tokenizer(section.tokenizer)
    return load_tokenizer(str(section.model_name_or_path), revision=section.model_revision)


def load_any_model(name: str, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """The model and tokenizer of a folder (full weights or an adapter) or Hub id, ready to generate."""
    from pathlib import Path

    from sft.models.load import load_checkpoint, machine_dtype
    from sft.tokenizers.load import load_tokenizer

    if (Path(name) / "adapter_config.json").is_file():
        raise UserError(f"{name} holds an adapter; use --config RECIPE --stage NAME, or export it merged first")
    dtype = machine_dtype(name, "bfloat16", trust_remote_code=trust_remote_code)
    model = load_checkpoint(name, dtype=dtype, trust_remote_code=trust_remote_code)
    return on_device(model), load_tokenizer(name)


def on_device(model: Any) -> Any:
    """`model` in eval mode on the GPU where there is one."""
    import torch

    return (model.to("cuda") if torch.cuda.is_available() else model).eval()


def prepare_with_progress(recipe: Recipe, stage: Stage, tokenizer: Any, engine: str = "local") -> PreparedStage:
    """The stage's prepared data; a bar on the terminal counts rows, shards and packs while they are made."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from sft.data.prepare import prepare_stage

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, transient=True) as bars:
        tasks: dict[str, Any] = {}

        def progress(phase: str, done: int, total: int | None) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(f"{stage.name}: {phase}", total=total)
            bars.update(tasks[phase], completed=done, total=total)

        return prepare_stage(recipe, stage, tokenizer, progress=progress, engine=engine)


# ---- the terminal ----


def console() -> Console:
    """Where tables go: the terminal, or lines that aren't folded when it isn't one."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def progress_line(text: str) -> None:
    """One step of long work, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)


def show_results(recipe: Recipe, result: dict[str, Any]) -> None:
    """The stages of `sft run` or `sft train`, and the evaluations."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=recipe.name, title_justify="left")
    for heading in ("stage", "steps", "last loss", "supervised tokens", "model"):
        table.add_column(heading, justify="right" if heading not in ("stage", "model") else "left")
    for name, manifest in result["stages"].items():
        loss = manifest.get("final_loss")
        tokens = manifest.get("counters", {}).get("supervised_tokens")
        table.add_row(
            name,
            str(manifest.get("steps", "")),
            f"{loss:.4f}" if isinstance(loss, int | float) else "",
            f"{tokens:,.0f}" if isinstance(tokens, int | float) else "",
            str(RunPaths(recipe).final_dir(name)),
        )
    console().print(table)
    if result.get("evaluations"):
        show_evaluations(result["evaluations"])


def show_evaluations(results: dict[str, dict[str, Any]]) -> None:
    """pass@1 with its 95% interval, by point and suite."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for heading in ("after", "suite", "pass@1", "95% interval", "problems"):
        table.add_column(heading, justify="right" if heading in ("pass@1", "problems") else "left")
    for point, suites in results.items():
        for suite, metrics in suites.items():
            table.add_row(point, suite, *_numbers(metrics))
    console().print(table)


def _numbers(metrics: dict[str, Any]) -> tuple[str, str, str]:
    low, high = metrics["interval"]
    return f"{metrics['pass_at_1']:.1%}", f"{low:.1%} to {high:.1%}", str(metrics["problems"])


def quiet_libraries() -> None:
    """Keep the libraries' start-up chatter off the terminal. Call before the first heavy import."""
    for name, value in (
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("DS_LOG_LEVEL", "error"),
    ):
        os.environ.setdefault(name, value)
    if not sys.stderr.isatty():
        # Bars are for eyes; in a log each of their steps would be a line.
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("DeepSpeed", "torch.distributed.elastic", "torch.utils.cpp_extension", "absl", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.formatwarning = _plain_warning


def _plain_warning(message: Warning | str, *place: object, **line: object) -> str:
    """A warning as one line for users, without the place in the code that gave it."""
    return f"sft: {message}\n"
