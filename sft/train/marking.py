"""A written checkpoint is flushed, hashed and marked whole beside the steps that follow it.

Nothing of the model is needed for that: what is marked are files that nobody changes any more, a large model's tens of
gigabytes. Until its marker is there a checkpoint doesn't count, and older ones stay, as after a kill in the middle of a
save.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

from sft.utils.errors import UserError

LIMIT = 2 * 3600.0
"""Seconds that a checkpoint may take to be flushed and read: hundreds of gigabytes at 50 MB/s."""


class Marking:
    """The checkpoint that is being marked, on the process that marks them; one at a time."""

    def __init__(self) -> None:
        self._work: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do `work` beside what follows, once that of the checkpoint before is done."""
        self.finish()
        self._work = Future()
        # As a daemon: a process that gives up on a disk ends.
        Thread(target=_do, args=(work, self._work), name="marking", daemon=True).start()

    def finish(self) -> None:
        """Go on when the last checkpoint is marked. Raises what went wrong with it, once; UserError after LIMIT."""
        work, self._work = self._work, None
        if work is None:
            return
        try:
            work.result(LIMIT)
        except TimeoutError as error:
            if work.done():
                raise  # of the disk
            raise UserError(
                f"The last checkpoint's files weren't flushed to the disk and read within {LIMIT / 3600:.0f} hours: "
                "look after the disk, and give the same command again; it continues from the last whole checkpoint."
            ) from error


def _do(work: Callable[[], None], done: Future[None]) -> None:
    try:
        work()
    except BaseException as error:  # raised where it is waited for
        done.set_exception(error)
    else:
        done.set_result(None)
