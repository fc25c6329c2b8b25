"""Who works on the shards: this process, several processes of this machine, or a Ray cluster."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from sft.data.engine.worker import close_steps
from sft.utils.errors import UserError
from sft.utils.quiet import asked, quiet_libraries
from sft.utils.signals import on_parents_death

Work = Callable[[Any], dict[str, Any]]
TASK_LIMIT = 24 * 3600.0
"""Seconds in which at least one of the tasks under way has to end."""


class Engine(Protocol):
    """Does tasks, in any order."""

    workers: int

    def warm_up(self) -> None:
        """There will be more than one task: processes may start now."""

    def run(self, work: Work, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Each task and what `work` returned of it, as they are done. An error of one ends all."""

    def __enter__(self) -> Engine:
        """The engine itself."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of the processes, whatever they are doing."""


def free_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalEngine:
    """Processes of this machine. They start with the first step that has more than one shard.

    They are spawned, not forked: a process that has run torch or tokenizers holds threads and locks that don't survive
    a fork.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers or free_cores()
        self._pool: ProcessPoolExecutor | None = None

    def run(self, work: Work, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        """As in `Engine`. One task alone is done in this process."""
        if min(self.workers, len(tasks)) <= 1 or tasks[0].workers == 1:
            for task in tasks:
                yield task, work(task)
            close_steps()
            return
        yield from self._spread(work, tasks)

    def warm_up(self) -> None:
        """Start the processes, which takes seconds, while this one reads."""
        if self.workers > 1:
            self._started()

    def _started(self) -> ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_start_worker, initargs=(asked(),)
            )
            with _without_main():
                self._pool.submit(_import)  # with the first task all processes start
        return self._pool

    def _spread(self, work: Work, tasks: Sequence[Any]) -> Iterator[tuple[Any, dict[str, Any]]]:
        pool = self._started()
        running: dict[Future[dict[str, Any]], Any] = {}
        waiting = iter(tasks)
        try:
            while True:
                # A few ahead of the workers, so that a long list isn't in the queue at once.
                while len(running) < 2 * self.workers and (task := next(waiting, None)) is not None:
                    running[pool.submit(work, task)] = task
                if not running:
                    return
                done, _ = wait(running, timeout=TASK_LIMIT, return_when=FIRST_COMPLETED)
                if not done:
                    raise UserError("The processes that prepare data have finished nothing for a day: start again.")
                for future in done:
                    yield running.pop(future), future.result(timeout=0)
        except BrokenProcessPool as error:
            raise UserError(
                "A process that prepares data was killed, most likely because memory ran out; give the same command "
                "again with fewer processes (train.dataset_num_proc): what is done is kept."
            ) from error

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_steps()
        if self._pool is not None:
            pool, self._pool = self._pool, None
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
            pool.shutdown(wait=False, cancel_futures=True)


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep processes that start from running the main script again: one that prepares data would start processes."""
    main = sys.modules["__main__"]
    hidden: dict[str, Any] = {name: vars(main).pop(name) for name in ("__file__", "__spec__") if name in vars(main)}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(hidden)


def _start_worker(quiet: tuple[Path | None, bool] | None) -> None:
    """Die with the process that started this one, however that ends, leave Ctrl-C to it, and be as quiet."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    on_parents_death(signal.SIGKILL)  # not on Linux an orphan ends after its shard
    os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    if quiet is not None:
        quiet_libraries(quiet[0], debug=quiet[1])


def _import() -> None:
    """What most steps need, and takes long to import."""
    import transformers

    _ = transformers.PreTrainedTokenizerFast


def make_engine(name: str, workers: int | None) -> Engine:
    """The engine that `--engine` names: local or ray. Raises UserError where Ray isn't installed."""
    if name == "ray":
        from sft.data.engine.ray import RayEngine

        return RayEngine(workers)
    return LocalEngine(workers)
