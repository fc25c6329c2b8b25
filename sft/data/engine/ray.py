"""Ray as the engine: Ray Data spreads the shards of a step over a cluster that shares the folder of prepared data."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

from sft.data.engine.worker import Task
from sft.utils.errors import UserError, first_line

MISSING = "--engine ray needs Ray; install it with: pip install 'sambay-sft[ray]'"


class RayEngine:
    """Tasks as the rows of a Ray data set, done by a pool of actors: each keeps its step (tokenizer, index) over tasks.

    The shards are written by the actors, so every node must see the folder of prepared data (`prepared_dir`) at the
    same path. The rows are the same as the local engine's, since a task is. Connects to the cluster that RAY_ADDRESS
    names; without it, Ray starts on this machine.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise UserError(MISSING) from error
        self._started = not ray.is_initialized()
        if self._started:
            try:
                ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray raises its own, gRPC's and the system's
                raise UserError(f"The Ray cluster can't be reached or started: {first_line(error)}.") from error
        self.workers = workers or max(int(ray.cluster_resources().get("CPU", 1)), 1)

    def warm_up(self) -> None:
        """Ray starts its actors with the first step."""

    def run(self, work: Any, tasks: Sequence[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
        """Each task and what `work` returned of it, as they are done."""
        import ray

        if not tasks:
            return
        ray.data.DataContext.get_current().enable_progress_bars = False
        size = min(self.workers, tasks[0].workers, len(tasks))
        numbers = ray.data.from_items(list(range(len(tasks))), override_num_blocks=len(tasks))
        done = numbers.map_batches(
            _Worker,
            fn_constructor_args=(work, list(tasks)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=size),
        )
        try:
            for row in done.iter_rows():
                yield tasks[row["number"]], json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise _cause(error) from error

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        if self._started:
            ray.shutdown()


class _Worker:
    """An actor: does tasks by their number."""

    def __init__(self, work: Any, tasks: list[Task]) -> None:
        self._work, self._tasks = work, tasks

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        numbers = [int(number) for number in batch["item"]]
        # As text: Ray would make one table of the markers, and give each the keys of all others.
        return {"number": numbers, "result": [json.dumps(self._work(self._tasks[number])) for number in numbers]}


def _cause(error: BaseException) -> BaseException:
    """What a task raised, if it is for the user; Ray wraps it."""
    seen: BaseException | None = error
    while seen is not None:
        inner = getattr(seen, "cause", None) or seen.__cause__
        if isinstance(inner, UserError | OSError):
            return inner
        seen = inner if isinstance(inner, BaseException) else None
    return UserError(f"A step failed on the Ray cluster: {first_line(error)}")
