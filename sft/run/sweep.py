"""The runs of a sweep, one after the other: what is done is skipped, what failed is told and the others go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from sft.recipe.paths import RunPaths
from sft.report.sweep import Metric, Outcome, Sweep, as_json, summarize_sweep
from sft.run import chain
from sft.run.checks import check_recipe
from sft.run.identity import settled_parts
from sft.run.lock import lock
from sft.run.outlook import stage_state
from sft.train.interrupt import Interrupted, stop_signals
from sft.utils.distributed import decide, world_size
from sft.utils.errors import UsageError, sentence
from sft.utils.files import remove_file, sha256_json, write_json, write_text
from sft.utils.say import say
from sft.utils.tables import counted

if TYPE_CHECKING:
    from sft.recipe.grid import Grid, Point

Failed = Callable[["Point", Exception], None]


def check_sweep(grid: Grid, *, rehearsal: bool = False, processes: int | None = None) -> None:
    """Raise UsageError for all that can be known to be wrong with any point before work, and under a launcher.

    `processes`: that each point will have; default: this one.
    """
    decide(_refuse_launcher)
    lines: dict[str, None] = {}
    for point in grid.points:
        try:
            check_recipe(point.recipe, rehearsal=rehearsal, processes=processes)
        except UsageError as error:
            lines |= dict.fromkeys(str(error).splitlines())
    if lines:
        raise UsageError("\n".join(lines))


def _refuse_launcher() -> None:
    if world_size() > 1:
        raise UsageError(
            f"a sweep starts the processes of its points itself, and {world_size()} were started: leave the launcher "
            "out and set --num_processes, or run one point on them, with its values, by `sft run`"
        )


def run_point(grid: Grid, point: Point) -> dict[str, Any]:
    """Run one point, as `chain.run` does, with what the others have done taken over."""
    return chain.run(point.recipe, others=[RunPaths(other.recipe) for other in grid.points if other is not point])


def run_sweep(grid: Grid, metric: Metric, *, failed: Failed, first: Callable[[int], None] | None = None) -> Sweep:
    """Run every point, then write `sweep.json` and the best setting's recipe, `best.yaml`, into the sweep's folder.

    A stage, and an evaluation, that another point has done from the same parts is taken over. `failed` is called for a
    point that couldn't be run to its end. `first` is called with each point's number and may do its work, in other
    processes: what is done is looked up here. A signal ends the sweep; the same call goes on with it.
    """
    busy = f"Another sweep or run is at work in {grid.root}: wait for it, or set another output_dir."
    outcomes = []
    with stop_signals() as signals, lock(grid.root / ".lock", busy):
        for number, point in enumerate(grid.points, start=1):
            signals.check()
            say(f"{number} of {len(grid.points)}: {point.name}")
            try:
                if first is not None:
                    first(number)
                outcomes.append(_outcome(point, run_point(grid, point)))
            except Interrupted:
                raise
            except Exception as error:
                failed(point, error)
                outcomes.append(Outcome(point, error=sentence(error)))
        sweep = summarize_sweep(grid, outcomes, metric)
        _write(sweep)
    return sweep


def _outcome(point: Point, result: dict[str, Any]) -> Outcome:
    last = point.recipe.stages[-1].name
    held = result["stages"][last].get("validation") or {}
    return Outcome(point, result["evaluations"].get(last) or {}, held.get("loss_at_end"))


def _write(sweep: Sweep) -> None:
    from sft.recipe.load import resolved_yaml

    write_json(sweep.grid.root / "sweep.json", as_json(sweep))
    best = sweep.grid.root / "best.yaml"
    if sweep.best_point is None:
        remove_file(best)  # an earlier sweep's, of other values
    else:
        write_text(best, resolved_yaml(sweep.best_point.recipe))


# ---- before it runs ----


def sweep_outlook(grid: Grid, metric: Metric) -> Iterator[str]:
    """Lines for people: the grid, and of each point's stages whether they are done, to do, or another point's."""
    stages = grid.points[0].recipe.stages
    yield (
        f"{grid.points[0].recipe.name}: {counted(len(grid.points), 'point')} of {counted(len(stages), 'stage')} in "
        f"{grid.root}, compared by {metric}"
    )
    seen: dict[str, int] = {}
    for number, point in enumerate(grid.points, start=1):
        told = []
        for stage, key in zip(point.recipe.stages, _recipe_keys(point), strict=True):
            first = seen.setdefault(key, number)
            state = stage_state(RunPaths(point.recipe), stage)
            told.append(f"{stage.name} {state if first == number or state != 'to do' else f'as in {first}'}")
        yield f"{number}. {point.name}: {', '.join(told)}"
    total = len(grid.points) * len(stages)
    yield f"then: a table, sweep.html and best.yaml; {len(seen)} of {total} trainings are different ones"


def _recipe_keys(point: Point) -> Iterator[str]:
    """For each stage a key of all that the recipe says its weights follow from: of it and of the stages before it."""
    paths, so_far = RunPaths(point.recipe), sha256_json(point.recipe.model.model_dump())
    for stage in point.recipe.stages:
        so_far = sha256_json([so_far, settled_parts(paths, stage), stage.data.model_dump()])
        yield so_far
