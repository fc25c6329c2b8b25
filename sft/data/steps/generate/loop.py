"""An event loop that lives as long as a step, and ends in order on Ctrl-C, SIGTERM, SIGUSR1 and SIGHUP."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, TypeVar

from sft.utils.signals import STOP_SIGNALS

Item = TypeVar("Item")
Result = TypeVar("Result")


class Loop:
    """Runs coroutines one after the other; connections stay open in between."""

    def __init__(self) -> None:
        self._runner = asyncio.Runner()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What `work` returns.

        A signal cancels it, and when its tasks have ended, the signal goes to the handler that was there before: an
        exception that a handler raises in the midst of a task would be taken for the task's own. Python's own handler
        of Ctrl-C is left to asyncio.Runner, which does the same.
        """
        if threading.current_thread() is not threading.main_thread():
            return self._runner.run(work)
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        ours = [
            number
            for number, handler in before.items()
            if handler not in (None, signal.SIG_IGN, signal.default_int_handler)
        ]
        stopped: list[signal.Signals] = []

        async def guarded() -> Result:
            loop, task = asyncio.get_running_loop(), asyncio.current_task()
            assert task is not None

            def stop(number: signal.Signals) -> None:
                stopped.append(number)
                task.cancel()

            for number in ours:
                loop.add_signal_handler(number, stop, number)
            try:
                return await work
            finally:
                for number in ours:
                    loop.remove_signal_handler(number)

        try:
            return self._runner.run(guarded())
        finally:
            for number in ours:
                signal.signal(number, before[number])
            if stopped:
                signal.raise_signal(stopped[0])

    def close(self) -> None:
        """Cancel what is left and close the loop."""
        self._runner.close()


async def together(work: Callable[[Item], Awaitable[Result]], items: Sequence[Item]) -> list[Result]:
    """`work` on all items at once; results in their order. The first error cancels the others and is raised itself."""

    async def one(item: Item) -> Result:
        return await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
    except BaseExceptionGroup as errors:
        raise _first(errors) from None
    return [task.result() for task in tasks]  # bounded: the group has waited for them


async def flowing(work: Callable[[Item], Awaitable[Result]], items: Iterable[Item], window: int) -> None:
    """`work` on all items, `window` of them at once: the next one begins when any has ended.

    The first error cancels the others and is raised itself.
    """
    running: set[asyncio.Task[Result]] = set()

    async def one(item: Item) -> Result:
        return await work(item)

    async def some_end(least: int) -> None:
        while len(running) > least:
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)  # bounded: by each request
            running.difference_update(ended)
            found = [task.exception() for task in ended]  # bounded: they have ended
            errors = [error for error in found if error is not None]
            if errors:
                raise errors[0]

    try:
        for item in items:
            running.add(asyncio.create_task(one(item)))
            await some_end(window - 1)
        await some_end(0)
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _first(errors: BaseException) -> BaseException:
    while isinstance(errors, BaseExceptionGroup):
        errors = errors.exceptions[0]
    return errors
