"""What the verbs share: the recipe's options, the stages meant, tables and progress."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from sft.recipe import Recipe, RunPaths, Stage, load_recipe, resolved_yaml
from sft.recipe.data_checks import recipe_problems
from sft.recipe.problems import refuse
from sft.recipe.values import LARGEST_SEED, path_problem
from sft.utils.errors import UsageError, UserError, shown
from sft.utils.files import check_writable, write_text
from sft.utils.say import say

if TYPE_CHECKING:
    from rich.console import Console

    from sft.data.prepare import PreparedStage


PIPED_WIDTH = 160
CONFIG_HELP = "recipe file, or a name from `sft recipes`; may stand without --config"


def add_recipe_arguments(parser: argparse.ArgumentParser, *, stage: bool = True) -> None:
    """`--config`, `--stage` and `--dry_run`."""
    parser.set_defaults(prog=parser.prog)
    parser.add_argument("--config", metavar="RECIPE", help=CONFIG_HELP)
    if stage:
        parser.add_argument("--stage", metavar="NAME", help="this stage alone")
    parser.add_argument("--dry_run", action="store_true", help="check the recipe, tell what would be done, and exit")


def add_restart_argument(parser: argparse.ArgumentParser) -> None:
    """`--restart`."""
    text = "throw away what this stage and the later ones have made, once, and do them again"
    parser.add_argument("--restart", metavar="STAGE", help=text)


def add_processes_argument(parser: argparse.ArgumentParser, *, itself: bool = True) -> None:
    """`--num_processes`. `itself`: this command is what runs as so many processes."""
    text = "processes of this machine that share the work (default: one for each GPU; 1: this one alone)"
    parser.add_argument("--num_processes", type=positive, metavar="N", help=text)
    parser.set_defaults(as_processes=itself)


def whole(text: str) -> int:
    """An option's whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, not {shown(text[:60])}") from None


def real(text: str) -> float:
    """An option's number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, not {shown(text[:60])}") from None


def positive(text: str) -> int:
    """An option's whole number above zero."""
    number = whole(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def seed(text: str) -> int:
    """An option's seed."""
    number = whole(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"must be from 0 to {LARGEST_SEED}, not {shown(text[:60])}")
    return number


def file_path(text: str) -> str:
    """An option's file or folder that will be written."""
    if problem := path_problem(text):
        raise argparse.ArgumentTypeError(f"the path {problem}")
    return text


def check_model(name: str) -> None:
    """Raise UsageError where --model names a folder that isn't there; names on the Hub are asked for when they load."""
    from sft.tokenizers.load import check_named

    try:
        check_named(name, "model", hub=False)
    except UserError as error:
        raise UsageError(f"--model: {error}") from error


# ---- the recipe ----


def recipe_of(arguments: argparse.Namespace, overrides: list[str], *, as_run: bool = False) -> Recipe:
    """The recipe that the command line means; its --stage and --restart are checked too. Raises UsageError.

    `as_run`: what the command line of its run set needn't be said again.
    """
    name, keys = named_recipe(arguments, overrides)
    recipe = load_recipe(name, [*(_as_run(name, keys) if as_run else ()), *keys])
    refuse(recipe_problems(recipe), recipe.place)
    for option in ("stage", "restart"):
        if getattr(arguments, option, None):
            recipe.stage(getattr(arguments, option))
    return recipe


def recipe_for_all(arguments: argparse.Namespace, overrides: list[str]) -> Recipe:
    """The same for a verb that several processes do together: what is wrong is found, and told, by the main one."""
    from sft.utils.distributed import decide

    recipe: Recipe = decide(lambda: recipe_of(arguments, overrides))
    return recipe


def _as_run(name: str, keys: list[str]) -> list[str]:
    """What the run's command line set; a line says so, without the values, which may be secret."""
    from sft.run.record import overrides_as_run

    before = overrides_as_run(name, keys)
    told = {word.partition("=")[0] for word in keys if word.startswith("--")}
    options = dict.fromkeys(word.partition("=")[0] for word in before if word.startswith("--"))
    if again := [option for option in options if option not in told]:
        say(f"as it ran: {' '.join(again)} as then")
    return before


def named_recipe(arguments: argparse.Namespace, words: list[str]) -> tuple[str, list[str]]:
    """As `recipe_and_keys`. Raises UsageError where no recipe is named."""
    name, keys = recipe_and_keys(arguments.config, words)
    if name is None:
        raise UsageError(f"no recipe is named: a file, or a name from `sft recipes`; see `{arguments.prog} --help`")
    return name, keys


def recipe_and_keys(config: str | None, words: list[str]) -> tuple[str | None, list[str]]:
    """The recipe that is named, by --config or by a word of its own, and the words that set keys of it."""
    keys, alone, rest = [], [], list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            takes_next = "=" not in word and rest and not rest[0].startswith("--")
            keys += [word, rest.pop(0)] if takes_next else [word]
        else:
            alone.append(word)
    if config is None and alone:
        config = alone.pop(0)
    # What is left over is told by those who read the keys.
    return config, [*alone, *keys]


def dry_run(
    arguments: argparse.Namespace,
    recipe: Recipe,
    plan: Iterable[str],
    parts: Sequence[str] = (),
    *,
    processes: int | None = None,
) -> int:
    """Check all that can be checked here of the `parts` that a verb does, tell its `plan`, and write the resolved
    recipe: in the record's place while there is none, else beside it. The main process alone does.

    `processes`: that would train; default: those there are.
    """
    from sft.run.checks import check_recipe
    from sft.utils.distributed import is_main
    from sft.utils.quiet import quiet_libraries

    if not is_main():
        return 0
    quiet_libraries(RunPaths(recipe).root)
    check_recipe(recipe, parts, stage=getattr(arguments, "stage", None), rehearsal=True, processes=processes)
    lines = list(plan)
    for line in lines:
        say(line)
    paths, text = RunPaths(recipe), resolved_yaml(recipe)
    path = paths.dry_run if paths.manifest.exists() or paths.resolved.exists() else paths.resolved
    check_writable(paths.root, "--dry_run writes the resolved recipe there; copy the run and name it with --output_dir")
    write_text(path, text)
    arguments.told.update(dry_run=True, plan=lines, resolved=str(path))
    print(path)
    return 0


def stages_of(recipe: Recipe, arguments: argparse.Namespace) -> list[Stage]:
    """The stage that --stage names, or all."""
    return [recipe.stage(arguments.stage)] if arguments.stage else recipe.stages


def prepare_with_progress(recipe: Recipe, stage: Stage, tokenizer: Any, engine: str = "local") -> PreparedStage:
    """The stage's prepared data; a line on the terminal counts shards and packs while they are made."""
    from sft.data.prepare import prepare_stage
    from sft.utils.progress import PhaseLines

    return prepare_stage(recipe, stage, tokenizer, progress=PhaseLines(stage.name), engine=engine)


# ---- the terminal ----


def console() -> Console:
    """Where tables go: the terminal; or, when it isn't one, lines as wide as COLUMNS says, else 160."""
    from rich.console import Console

    columns = os.environ.get("COLUMNS", "")
    asked = int(columns) if columns.isdecimal() and int(columns) else None
    # What users call things is shown as it is: `[red]` and `:smile:` in a path are no markup.
    return Console(
        markup=False, emoji=False, highlight=False, width=asked or (None if sys.stdout.isatty() else PIPED_WIDTH)
    )


def results_told(recipe: Recipe, result: dict[str, Any]) -> dict[str, Any]:
    """What `show_results` shows, as values."""
    paths, names = RunPaths(recipe), ("steps", "final_loss", "validation", "counters")
    stages = {
        name: {**{key: manifest.get(key) for key in names}, "model": str(paths.final_dir(name))}
        for name, manifest in result["stages"].items()
    }
    told = {"recipe": recipe.name, "output_dir": str(paths.root), "stages": stages}
    from sft.train.alerts import read_alerts

    return {**told, "evaluations": result.get("evaluations") or {}, "alerts": read_alerts(paths.alerts)}


def show_results(recipe: Recipe, result: dict[str, Any]) -> None:
    """The stages of `sft run` or `sft train`, and the evaluations, if there are any."""
    from sft.utils.tables import numbers_table

    rows = []
    held = any(manifest.get("validation") for manifest in result["stages"].values())
    for name, manifest in result["stages"].items():
        loss = manifest.get("final_loss")
        tokens = manifest.get("counters", {}).get("supervised_tokens")
        rows.append(
            [
                name,
                str(manifest.get("steps", "")),
                f"{loss:.4f}" if isinstance(loss, int | float) else "",
                *([_before_and_after(manifest.get("validation"))] if held else []),
                f"{tokens:,.0f}" if isinstance(tokens, int | float) else "",
                str(RunPaths(recipe).final_dir(name)),
            ]
        )
    head = ("stage", "steps", "last loss", *(["held-out loss"] if held else []), "trained tokens", "model")
    text, optional, out = {"stage": 12, "model": 36}, ("trained tokens", "last loss"), console()
    out.print(numbers_table(head, rows, text=text, optional=optional, title=recipe.name, width=out.width))
    show_evaluations(result.get("evaluations") or {})


def _before_and_after(validation: dict[str, Any] | None) -> str:
    """The loss of held-out rows at a stage's start and end."""
    return f"{validation['loss_at_start']:.4f} > {validation['loss_at_end']:.4f}" if validation else ""


def show_evaluations(results: dict[str, dict[str, Any]]) -> None:
    """pass@1 with its 95% interval, a vote of all samples, and the share that was cut off, by point and suite; nothing
    where no suite was asked."""
    from sft.utils.distributed import is_main
    from sft.utils.tables import numbers_table

    if not is_main():
        return
    rows = [
        [point, suite, *_numbers(metrics)] for point, suites in results.items() for suite, metrics in suites.items()
    ]
    if rows:
        head, out = ("after", "suite", "pass@1", "95% interval", "majority", "cut off", "problems"), console()
        optional = ("problems", "cut off", "majority")
        out.print(numbers_table(head, rows, text={"after": 12, "suite": 12}, optional=optional, width=out.width))


def _numbers(metrics: dict[str, Any]) -> tuple[str, ...]:
    low, high = metrics["interval"]
    votes = list((metrics.get("majority_at_k") or {}).items())
    majority = f"{votes[-1][1]:.1%} of {votes[-1][0]}" if votes else ""
    cut = f"{metrics['cut_off']:.1%}" if "cut_off" in metrics else ""
    return f"{metrics['pass_at_1']:.1%}", f"{low:.1%} to {high:.1%}", majority, cut, str(metrics["problems"])
