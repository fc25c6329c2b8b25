"""`sft sweep`: a grid of recipes."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING

from sft.cli.common import add_processes_argument, add_recipe_arguments, console, named_recipe, positive
from sft.utils.distributed import alike
from sft.utils.errors import UsageError, UserError, sentence, shown
from sft.utils.progress import end_line
from sft.utils.quiet import quiet_libraries
from sft.utils.say import say

if TYPE_CHECKING:
    from sft.recipe.grid import Grid, Point
    from sft.report.sweep import Sweep

TAKES_OVERRIDES = True
COMMAS = """and to several values, each a run of its own in every combination with the others:
  --stages.NAME.train.learning_rate 1e-5,2e-5   --defaults.train.seed 1,2
a comma inside brackets parts nothing; one that belongs to a value is written \\, with a backslash"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recipe's options, and what is the best."""
    add_recipe_arguments(parser, stage=False)
    add_processes_argument(parser, itself=False)
    parser.epilog = f"{parser.epilog}\n{COMMAS}"
    text = (
        "what is best after the last stage: SUITE:pass@1 (default: its first suite), SUITE:pass@K, or loss (held out)"
    )
    parser.add_argument("--metric", metavar="METRIC", help=text)
    # How the processes of one point are told which it is; see `_in_processes`.
    parser.add_argument("--point", type=positive, help=argparse.SUPPRESS)


def execute(arguments: argparse.Namespace, overrides: list[str]) -> int:
    """Run every point, tell what they came to, and write sweep.html and best.yaml; 1 where a point failed."""
    from sft.recipe.grid import load_grid

    name, words = named_recipe(arguments, overrides)
    grid = load_grid(name, words)
    quiet_libraries(grid.root, debug=arguments.debug)
    from sft.report.sweep import as_json, choose_metric
    from sft.run.placement import processes
    from sft.run.sweep import check_sweep, run_sweep, sweep_outlook

    if arguments.point is not None:
        return _one_point(grid, arguments.point)
    metric = choose_metric(arguments.metric, [point.recipe for point in grid.points])
    check_sweep(grid, rehearsal=arguments.dry_run, processes=processes(arguments.num_processes))
    if arguments.dry_run:
        plan = list(sweep_outlook(grid, metric))
        for line in plan:
            say(line)
        arguments.told.update(dry_run=True, plan=plan)
        return 0

    def failed(point: Point, error: Exception) -> None:
        end_line()
        for line in sentence(error).splitlines():
            print(f"sft: {point.name}: {shown(line)}", file=sys.stderr)
        if arguments.debug:
            traceback.print_exception(error)

    sweep = run_sweep(grid, metric, failed=failed, first=_in_processes(arguments))
    arguments.told.update(as_json(sweep))
    _show(sweep)
    _write_page(sweep)
    return 1 if any(outcome.error for outcome in sweep.outcomes) else 0


def _in_processes(arguments: argparse.Namespace) -> Callable[[int], None] | None:
    """What runs the point of a number as several processes, that end with it; None: this one runs it."""
    from sft.run.placement import placement

    where = placement(arguments.num_processes)
    if where is None:
        return None
    if where.nodes > 1:
        raise UsageError("a sweep runs on one machine: leave the nodes' variables out, or run one point by `sft run`")
    from sft.run.launching import STOPPED, launch
    from sft.train.interrupt import Stopped

    def run(number: int) -> None:
        words = [word for word in arguments.words if word != "--json"]
        status = launch([*words, "--point", str(number)], where)
        if status in STOPPED:
            raise Stopped(status - 128)
        if status:
            raise UserError(f"its processes ended with status {status}, for the reason above")

    return run


def _one_point(grid: Grid, number: int) -> int:
    """A point, by all processes together, under the sweep that has started them."""
    from sft.run.sweep import run_point

    with alike():
        if number > len(grid.points):
            raise UsageError(f"--point {number}: the grid has {len(grid.points)}")
    run_point(grid, grid.points[number - 1])
    return 0


def _show(sweep: Sweep) -> None:
    from sft.report.sweep import table
    from sft.report.sweep_page import verdict
    from sft.utils.tables import numbers_table

    (head, rows), out = table(sweep), console()
    text = {axis.label: max(8, len(axis.label)) for axis in sweep.grid.axes}
    out.print(numbers_table(head, rows, text=text, title=sweep.grid.points[0].recipe.name, width=out.width))
    out.print(verdict(sweep))


def _write_page(sweep: Sweep) -> None:
    from sft.report.sweep_page import write_sweep_page

    say(f"sweep: {write_sweep_page(sweep)}")
    if sweep.best_point is not None:
        say(f"best: {sweep.grid.root / 'best.yaml'}")
