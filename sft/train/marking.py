"""A written checkpoint is flushed, hashed and marked whole beside the steps that follow it.

Nothing of the model is needed for that: what is marked are files that nobody changes any more, a large model's tens of
gigabytes. Until its marker is there a checkpoint doesn't count, and older ones stay, as after a kill in the middle of a
save.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Marking:
    """The checkpoint that is being marked, on the process that marks them; one at a time."""

    def __init__(self) -> None:
        self._worker: ThreadPoolExecutor | None = None
        self._work: Future[None] | None = None

    def begin(self, work: Callable[[], None]) -> None:
        """Do `work` beside what follows, once that of the checkpoint before is done."""
        self.wait()
        self._worker = self._worker or ThreadPoolExecutor(1, thread_name_prefix="marking")
        self._work = self._worker.submit(work)

    def wait(self) -> None:
        """Go on when the last checkpoint is marked. Raises what went wrong with it, once."""
        work, self._work = self._work, None
        if work is not None:
            work.result()  # bounded: it reads and flushes the files of one checkpoint
